"""Loading a model for the commands that compute. The only module here that leads to torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptdb.commits import PutReport, PutRequest
from promptdb.db import PromptDB
from promptdb.errors import ModelNotFoundError

if TYPE_CHECKING:
    from promptdb.engine import Engine


class CountingDB(PromptDB):
    """A store that remembers what its puts wrote until :meth:`claim` asks for it. Thread safe."""

    def __init__(self, path: str | None, ttl_s: float | None, shared: str | None = None) -> None:
        super().__init__(path, ttl_s=ttl_s, shared=shared)
        self._lock = threading.Lock()
        # By length and content of the packed tokens of a put.
        self._reports: dict[int, dict[bytes, PutReport]] = {}

    def put_many(self, requests: Sequence[PutRequest]) -> list[PutReport]:
        """See :meth:`PromptDB.put_many`."""
        reports = super().put_many(requests)
        with self._lock:
            for request, report in zip(requests, reports, strict=True):
                known = self._reports.setdefault(len(request.packed), {})
                known[request.packed] = add_reports(known.get(request.packed, PutReport()), report)
        return reports

    def claim(self, packed: bytes) -> PutReport:
        """Return what was written of a prompt's packed tokens, and forget it: the next prompt that shares them wrote
        nothing of them."""
        found = PutReport()
        with self._lock:
            for length in [each for each in self._reports if each <= len(packed)]:
                known = self._reports[length]
                found = add_reports(found, known.pop(packed[:length], PutReport()))
                if not known:
                    del self._reports[length]
        return found


def add_reports(one: PutReport, other: PutReport) -> PutReport:
    """Return the sum of two reports."""
    return PutReport(*(getattr(one, field.name) + getattr(other, field.name) for field in fields(PutReport)))


@contextmanager
def open_engine(
    db: PromptDB, model: str, dtype: str, device: str | None, namespace: str, kv_codec: str | None = None
) -> Iterator[Engine]:
    """Load a model, saying so on a terminal; leaving the context waits until all is stored."""
    on_terminal = _quieten()
    with _spinner(f"loading {model}") if on_terminal else nullcontext():
        engine = _load(db, model, dtype, device, namespace=namespace, kv_codec=kv_codec or "")
    with engine:
        yield engine


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a checkpoint that the store does not know; no weights are read."""
    _quieten()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelNotFoundError(
            f"transformers cannot load the tokenizer of {directory}: {reason}", "check the directory"
        ) from error


def _quieten() -> bool:
    """Keep the libraries from printing; return whether there is a terminal for what this program has to say."""
    on_terminal = sys.stderr.isatty()
    if not on_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return on_terminal


def _load(db: PromptDB, model: str, dtype: str, device: str | None, **options: str) -> Engine:
    from transformers.utils import logging

    from promptdb.engine import Engine

    logging.disable_progress_bar()  # ours says that the model is loading
    return Engine.from_pretrained(db, model, dtype=dtype, device=device, **options)


def _spinner(message: str) -> AbstractContextManager[object]:
    from rich.console import Console

    return Console(stderr=True).status(message)
