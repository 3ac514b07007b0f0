"""``promptdb get``: the longest stored prefix of a prompt, and what the model would say next."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import click

from promptdb.db import PromptDB
from promptdb.errors import PromptError, ReadOnlyStoreError
from promptdb.keys import Root
from promptdb.pulling import Want
from promptdb.shared import connect
from promptdb.shared_options import resolve
from promptdb.tokens import Encoder, Prompt

from .answer import Wanted, answer, print_answer
from .failure import Failure
from .known import check_checkpoint, find_model
from .options import (
    device_option,
    kv_codec_option,
    model_options,
    prompt_arguments,
    shared_option,
    store_options,
)
from .output import print_json
from .prompts import Asked, read_prompts


@dataclass(frozen=True)
class Ready:
    """A prompt in tokens, and where to look it up."""

    db: PromptDB
    root: Root
    encoder: Encoder
    prompt: Prompt
    tokens_fetched: int = 0
    tokens_computed: int = 0
    compute_s: float = 0.0


@click.command(short_help="Look up the longest stored prefix of a prompt.")
@prompt_arguments
@model_options
@kv_codec_option
@device_option
@shared_option
@store_options
@click.option("--top", metavar="K", type=click.IntRange(0), default=5, show_default=True, help="How many next tokens.")
@click.option("--logprobs", is_flag=True, help="Print the log-probability of each stored token.")
@click.option(
    "--out",
    metavar="FILE.safetensors",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the keys and values of the stored prefix.",
)
@click.option("--compute", is_flag=True, help="Compute what is missing, and store it; loads the model.")
@click.pass_context
def get(
    ctx: click.Context,
    texts: Sequence[str],
    files: Sequence[str],
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    kv_codec: str | None,
    shared: str | None,
    path: str | None,
    as_json: bool,
    top: int,
    logprobs: bool,
    out: Path | None,
    compute: bool,
) -> None:
    """Look up the longest stored prefix of a prompt.

    Prints how much is stored, and the most probable next tokens after it. The model's weights are not loaded unless
    --compute is given. TEXTs and files are read as `promptdb put` reads them. What is missing and lies in a shared
    store is fetched first.

    Exit code: 0 if every prompt is stored with the logits after its last token, 1 if one is not, 2 on errors.

    \b
    Examples:
      promptdb get --model demo "Return the number of items"
      promptdb get --model demo --logprobs --json "Return the number"
      promptdb get --model demo --compute --out kv.safetensors "Return the number of lines"
      promptdb get --model demo --shared redis://cache.example:6379 "Return the number of items"
    """
    prompts = read_prompts(texts, files)
    if out is not None:
        if kv_codec is not None:
            raise click.UsageError("--out writes exact keys and values: not with --kv-codec")
        if len(prompts) > 1:
            raise click.UsageError("--out writes one prompt; several were given.")
        if not out.parent.is_dir():
            raise Failure(f"there is no directory {out.parent}", "create it, or choose another place for --out")
    wanted = Wanted(top, logprobs, out)
    ready = (
        _compute(prompts, path, shared, model, dtype, device, namespace, kv_codec)
        if compute
        else _find(prompts, path, shared, model, dtype, namespace, kv_codec)
    )
    is_complete = True
    with closing(ready):
        for number, (asked, each) in enumerate(zip(prompts, ready, strict=True)):
            found = {
                "source": asked.place,
                "tokens_fetched": each.tokens_fetched,
                "tokens_computed": each.tokens_computed,
                "compute_s": each.compute_s,
                **answer(each.db, each.root, each.encoder, each.prompt, wanted),
            }
            is_complete = is_complete and found["is_complete"]
            if as_json:
                print_json(found)
            else:
                print_answer(found, separated=number > 0)
    ctx.exit(0 if is_complete else 1)


def _find(
    prompts: Sequence[Asked],
    path: str | None,
    shared: str | None,
    model: str,
    dtype: str,
    namespace: str,
    kv_codec: str | None,
) -> Generator[Ready, None, None]:
    with _opened(path, shared) as db:
        known = find_model(db, model, dtype, namespace, kv_codec)
        for asked in prompts:
            try:
                prompt = known.tokenize(asked.pieces)
            except PromptError as error:
                asked.refuse(error)
            yield Ready(db, known.root, known.encoder, prompt, _fetch(db, known.root, prompt))


def _opened(path: str | None, shared: str | None) -> PromptDB:
    """Open a store to look prompts up; for writing if something may come from a shared one."""
    with ExitStack() as stack:
        db = stack.enter_context(PromptDB(path, readonly=True))
        with db.read() as snapshot:
            options = resolve(shared, False, snapshot.reader)
        if options is None:
            stack.pop_all()  # it stays open, for the caller to close
            return db
    try:
        # A lookup sends nothing, and does not wait for what others have left to be sent.
        return PromptDB(path, shared=replace(options, readonly=True))
    except ReadOnlyStoreError as error:
        click.echo(f"{error.message}: nothing is fetched from the shared store", err=True)
    return PromptDB(path, readonly=True)


def _fetch(db: PromptDB, root: Root, prompt: Prompt) -> int:
    """Fetch what is missing of a prompt, if there is a shared store; return how many tokens came."""
    tier = connect(db)
    if tier is None:
        return 0
    with db.read() as snapshot:
        match = snapshot.match(root, prompt.packed)
    if match.is_complete or match.is_damaged:
        return 0
    before = tier.calls.counts.tokens_fetched
    tier.pull(root, [Want(prompt.packed, prompt.boundaries, match.num_tokens, match.has_logits)])
    return tier.calls.counts.tokens_fetched - before


def _compute(
    prompts: Sequence[Asked],
    path: str | None,
    shared: str | None,
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    kv_codec: str | None,
) -> Generator[Ready, None, None]:
    from .compute import open_engine  # leads to torch

    check_checkpoint(model)
    with (
        PromptDB(path, shared=shared) as db,
        open_engine(db, model, dtype, device, namespace, kv_codec) as engine,
    ):
        for asked in prompts:
            before = 0 if db.tier is None else db.tier.calls.counts.tokens_fetched
            try:
                prompt = engine.tokenize(asked.pieces)
                representation = engine.put(prompt)
            except PromptError as error:
                asked.refuse(error)
            fetched = 0 if db.tier is None else db.tier.calls.counts.tokens_fetched - before
            computed, compute_s = representation.tokens_computed, representation.compute_s
            yield Ready(db, engine.root, engine.encoder, prompt, fetched, computed, compute_s)
