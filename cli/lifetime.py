"""What ``promptdb put`` does with ``--tag`` and ``--ttl``, for prompts that are stored."""

from __future__ import annotations

from contextlib import suppress

from promptdb.db import PromptDB
from promptdb.errors import NodeNotFoundError
from promptdb.keys import Root, num_tokens


def apply_lifetime(db: PromptDB, root: Root, packed: bytes, *, tag: str | None, ttl_s: float | None) -> None:
    """Give a prompt that was stored just now a tag, and let what was stored of it before live as long as the rest.

    Parameters
    ----------
    root, packed : of the prompt, all of whose tokens are durable: after the engine's ``flush``.
    tag : name; None: none.
    ttl_s : seconds from now, infinite for ever; None: as it is. Never shortens.
    """
    if ttl_s is not None:
        db.put(root, packed, num_tokens(packed), lambda _: [], ttl_s=ttl_s)
    if tag is not None:
        with suppress(NodeNotFoundError):  # a quota that is smaller than the job may have evicted it already
            db.tag(tag, root, packed)
