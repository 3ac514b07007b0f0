"""Loading a model for the commands that compute. The only module here that leads to torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from promptdb.commits import PutReport
from promptdb.db import PromptDB
from promptdb.keys import Root

if TYPE_CHECKING:
    from promptdb.engine import Engine


class CountingDB(PromptDB):
    """A store that notes what each put wrote, by the prompt's packed tokens. Thread safe: a list's append is."""

    def __init__(self, path: str | None) -> None:
        super().__init__(path)
        self._reports: list[tuple[bytes, PutReport]] = []

    def put(self, root: Root, packed: bytes, *args: Any, **options: Any) -> PutReport:
        """See :meth:`PromptDB.put`."""
        report = super().put(root, packed, *args, **options)
        self._reports.append((packed, report))
        return report

    def written(self) -> dict[bytes, PutReport]:
        """Return what was written so far for each prompt."""
        totals: dict[bytes, PutReport] = {}
        for packed, report in self._reports:
            before = totals.get(packed, PutReport())
            totals[packed] = PutReport(
                before.num_spans + report.num_spans,
                before.num_tokens + report.num_tokens,
                before.num_bytes + report.num_bytes,
            )
        return totals


@contextmanager
def open_engine(db: PromptDB, model: str, dtype: str, device: str | None, namespace: str) -> Iterator[Engine]:
    """Load a model, saying so on a terminal; leaving the context waits until all is stored."""
    on_terminal = sys.stderr.isatty()
    if not on_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with _spinner(f"loading {model}") if on_terminal else nullcontext():
        engine = _load(db, model, dtype, device, namespace)
    with engine:
        yield engine


def _load(db: PromptDB, model: str, dtype: str, device: str | None, namespace: str) -> Engine:
    import torch
    from transformers.utils import logging

    from promptdb.engine import Engine

    logging.disable_progress_bar()  # ours says that the model is loading
    if device is not None:
        try:
            wanted = torch.device(device)
        except RuntimeError:
            raise click.BadParameter(f"{device!r} is no device; cpu and cuda are", param_hint="--device") from None
        if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
            found = f"{torch.cuda.device_count()} CUDA devices"
            raise click.BadParameter(f"there is no {device}: torch finds {found}", param_hint="--device")
    return Engine.from_pretrained(db, model, dtype=dtype, device=device, namespace=namespace)


def _spinner(message: str) -> AbstractContextManager[object]:
    from rich.console import Console

    return Console(stderr=True).status(message)
