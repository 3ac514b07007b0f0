"""One of the machines that compute a corpus for all: a model, a local store, and the shared one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType

from promptdb.db import PromptDB
from promptdb.engine import Engine
from promptdb.errors import IdentityError, SharedError
from promptdb.pulling import Want
from promptdb.shared import connect
from promptdb.tokens import Prompt


@dataclass(frozen=True)
class Done:
    """What became of a share.

    Attributes
    ----------
    num_prompts : that it has.
    tokens_loaded, tokens_computed : summed over prompts; what several share was computed for one of them.
    tokens_fetched : that came from the shared store.
    bytes_sent : that were new there. All of the share has arrived.
    elapsed_s : from taking the share to that moment.
    """

    num_prompts: int
    tokens_loaded: int
    tokens_computed: int
    tokens_fetched: int
    bytes_sent: int
    elapsed_s: float


class Worker:
    """Computes shares of a corpus, and sends them to the shared store. Not thread safe; a context manager.

    Parameters
    ----------
    model : directory of a checkpoint, or an ID on the hub: the same one on every machine.
    shared : URL of the shared store.
    path : of the local store; by default this machine's. Workers on one machine may have it in common.
    dtype, device, namespace : see :class:`promptdb.Engine` and its ``from_pretrained``.
    tokenizer_id : of whoever cut the corpus; another tokenizer than that is refused.

    Raises
    ------
    SharedError
        There is no shared store, or it may not be written.
    IdentityError
        The tokenizer is another one.
    """

    def __init__(
        self,
        model: str,
        shared: str,
        *,
        path: str | os.PathLike[str] | None = None,
        dtype: str = "auto",
        device: str | None = None,
        namespace: str = "",
        tokenizer_id: str = "",
    ) -> None:
        self._db = PromptDB(path, shared=shared, shared_required=True)
        try:
            tier = connect(self._db)
            if tier is None:
                raise SharedError("a worker needs a shared store", "name one: redis://HOST, s3://BUCKET/PATH, ...")
            if tier.options.readonly:
                raise SharedError("the shared store is for reading only, and a worker writes", "leave readonly out")
            self._tier = tier
            self._engine = Engine.from_pretrained(self._db, model, dtype=dtype, device=device, namespace=namespace)
            if tokenizer_id and self._engine.tokenizer_id != tokenizer_id:
                raise IdentityError(
                    f"the tokenizer of {model} is not the one that the corpus was cut with",
                    "use the same files on every machine",
                )
        except BaseException:
            self._db.close()
            raise

    def root(self) -> str:
        """Return what results are stored under, in hex: workers with different ones do not find each other's."""
        return self._engine.root.digest.hex()

    def compute(self, prompts: Sequence[Prompt], bases: Sequence[Prompt] = ()) -> Done:
        """Compute prompts; return when all of them are in the shared store.

        Parameters
        ----------
        bases : beginnings that others have computed, and that the prompts go on from. They are fetched, however fast
            the model is.

        Raises
        ------
        SharedError
            The far side fails. What was computed is in the local store, and is sent when it works again.
        PromptDBError
            As :meth:`promptdb.Engine.run` does.
        """
        began, counts = perf_counter(), self._tier.calls.counts
        fetched, sent = counts.tokens_fetched, counts.bytes_sent
        self._fetch(bases)
        loaded = computed = 0
        for found in self._engine.run(prompts):
            loaded += found.tokens_loaded
            computed += found.tokens_computed
        self._engine.flush()
        if not self._tier.flush():
            self._tier.raise_failure()
            raise SharedError("what was computed waits to be sent", "`promptdb push` sends it")
        return Done(
            len(prompts),
            loaded,
            computed,
            counts.tokens_fetched - fetched,
            counts.bytes_sent - sent,
            perf_counter() - began,
        )

    def _fetch(self, prompts: Sequence[Prompt]) -> None:
        wants = []
        for prompt in prompts:
            match = self._engine.lookup(prompt)
            if not match.is_complete:
                wants.append(Want(prompt.packed, prompt.boundaries, match.num_tokens, match.has_logits))
        if wants:
            self._tier.pull(self._engine.root, wants)

    def close(self) -> None:
        """Store what was computed, and close the store. Closing twice is harmless."""
        try:
            self._engine.close()
        finally:
            self._db.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
