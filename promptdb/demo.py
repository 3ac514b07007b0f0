"""The demo model: a small Llama-style model, trained on the docstrings of Python's standard library, which every
machine has, and written in Hugging Face format. No model hub is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptdb.demo_models import random_model
from promptdb.demo_text import VOCAB_SIZE, byte_tokenizer, corpus, demo_tokenizer
from promptdb.demo_training import train
from promptdb.errors import ModelError

__all__ = ["DemoReport", "write_demo_model"]

NUM_STEPS = 120


@dataclass(frozen=True)
class DemoReport:
    """What :func:`write_demo_model` wrote."""

    directory: Path
    architecture: str
    num_parameters: int
    vocab_size: int
    """Tokens of the tokenizer; the model may have more."""
    size_bytes: int
    """Of all files together."""
    seconds: float
    num_tokens_trained: int = 0
    """Tokens read while training, repetitions included."""
    loss: float | None = None
    """Mean of the last steps, in nats per token; None if nothing was trained."""
    heldout_loss: float | None = None
    """On documents that were not trained on, in nats per token."""


_MARKER = "demo.json"  # tells our directories from a checkpoint that somebody trained for a month
_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    _MARKER,
}


def write_demo_model(
    directory: str | os.PathLike[str],
    *,
    arch: str | None = None,
    size: str | None = None,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    max_chars: int = 2_000_000,
    overwrite: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> DemoReport:
    """Write a small language model and its tokenizer in Hugging Face format, with no network.

    Parameters
    ----------
    directory : where to; parents are created. It is renamed into place when complete.
    arch, size : as for :func:`random_model`. With either of them the weights are random and nothing is trained;
        without, a Llama-style model is trained on :func:`corpus`.
    seed : of weights and training order.
    num_steps : training steps of 1,024 tokens each, after the embeddings are fitted.
    max_chars : most characters of :func:`corpus` to train on.
    overwrite : replace an earlier demo model.
    progress : called with (steps done, steps in all, loss) after each step.

    Returns
    -------
    DemoReport

    Raises
    ------
    ModelError
        ``directory`` holds something that is not a demo model, or one without ``overwrite``; ``num_steps`` is negative;
        there is no source text of the standard library to train on; or as :func:`random_model`.

    Notes
    -----
    The default takes some 40 seconds on a slow CPU. The files are the same, bit by bit, for the same arguments on one
    machine with the same versions of Python and torch. Training uses one thread, because the order of sums depends on
    the number of threads; torch's settings are restored.
    """
    started = time.perf_counter()
    target = Path(directory).absolute()
    _check_target(target, overwrite=overwrite)
    if num_steps < 0:
        raise ModelError(f"num_steps is {num_steps}", "give 0 or more")
    losses: dict[str, Any] = {}
    if arch is None and size is None:
        documents = corpus(max_chars).split("\n\n")
        model, tokenizer, losses = train(documents, seed, num_steps, progress or (lambda *_: None))
    else:
        model = random_model(arch, size=size, seed=seed)
        fits = model.config.vocab_size >= VOCAB_SIZE
        tokenizer = demo_tokenizer(corpus(max_chars).split("\n\n")) if fits else byte_tokenizer()
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", 1024)

    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}.new")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        with _quiet():
            model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        about = {"promptdb_demo": 1, "arch": model.config.model_type, "size": size, "seed": seed} | losses
        (staged / _MARKER).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
        _check_target(target, overwrite=overwrite)  # again: training took its time
        if target.exists():
            target.rename(replaced)
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    return DemoReport(
        directory=target,
        architecture=model.config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=len(tokenizer),
        size_bytes=sum(path.stat().st_size for path in target.iterdir()),
        seconds=time.perf_counter() - started,
        **losses,
    )


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    names = {path.name for path in target.iterdir()} if target.is_dir() else {""}
    if names and (_MARKER not in names or names - _FILES):
        others = ", ".join(sorted(names - _FILES)[:3]) or "a model that is not a demo model"
        raise ModelError(f"{target} holds {others if target.is_dir() else 'a file'}", "choose a new or empty directory")
    if names and not overwrite:
        raise ModelError(f"{target} holds a demo model already", "pass overwrite=True, or --overwrite, to replace it")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()  # "Writing model shards: 100%" for one file
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
