"""``promptdb get``: the longest stored prefix of a prompt, and what the model would say next."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import click

from promptdb.db import PromptDB
from promptdb.errors import PromptError
from promptdb.keys import Root
from promptdb.tokens import Encoder, Prompt

from .answer import Wanted, answer, print_answer
from .failure import Failure
from .known import check_checkpoint, find_model
from .options import device_option, kv_codec_option, model_options, prompt_arguments, store_options
from .output import print_json
from .prompts import Asked, read_prompts


@dataclass(frozen=True)
class Ready:
    """A prompt in tokens, and where to look it up."""

    db: PromptDB
    root: Root
    encoder: Encoder
    prompt: Prompt
    tokens_computed: int = 0
    compute_s: float = 0.0


@click.command(short_help="Look up the longest stored prefix of a prompt.")
@prompt_arguments
@model_options
@kv_codec_option
@device_option
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
    path: str | None,
    as_json: bool,
    top: int,
    logprobs: bool,
    out: Path | None,
    compute: bool,
) -> None:
    """Look up the longest stored prefix of a prompt.

    Prints how much is stored, and the most probable next tokens after it. The model's weights are not loaded unless
    --compute is given. TEXTs and files are read as `promptdb put` reads them.

    Exit code: 0 if every prompt is stored with the logits after its last token, 1 if one is not, 2 on errors.

    \b
    Examples:
      promptdb get --model demo "Return the number of items"
      promptdb get --model demo --logprobs --json "Return the number"
      promptdb get --model demo --compute --out kv.safetensors "Return the number of lines"
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
        _compute(prompts, path, model, dtype, device, namespace, kv_codec)
        if compute
        else _find(prompts, path, model, dtype, namespace, kv_codec)
    )
    is_complete = True
    with closing(ready):
        for number, (asked, each) in enumerate(zip(prompts, ready, strict=True)):
            found = {
                "source": asked.place,
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
    prompts: Sequence[Asked], path: str | None, model: str, dtype: str, namespace: str, kv_codec: str | None
) -> Generator[Ready, None, None]:
    with PromptDB(path, readonly=True) as db:
        known = find_model(db, model, dtype, namespace, kv_codec)
        for asked in prompts:
            try:
                prompt = known.tokenize(asked.pieces)
            except PromptError as error:
                asked.refuse(error)
            yield Ready(db, known.root, known.encoder, prompt)


def _compute(
    prompts: Sequence[Asked],
    path: str | None,
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    kv_codec: str | None,
) -> Generator[Ready, None, None]:
    from .compute import open_engine  # leads to torch

    check_checkpoint(model)
    with PromptDB(path) as db, open_engine(db, model, dtype, device, namespace, kv_codec) as engine:
        for asked in prompts:
            try:
                prompt = engine.tokenize(asked.pieces)
                representation = engine.put(prompt)
            except PromptError as error:
                asked.refuse(error)
            computed, compute_s = representation.tokens_computed, representation.compute_s
            yield Ready(db, engine.root, engine.encoder, prompt, computed, compute_s)
