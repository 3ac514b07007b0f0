"""``promptdb record``: compute activations of prompts and store them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from promptdb.errors import PromptError
from promptdb.hook_points import canonical_name
from promptdb.tokens import Prompt

from .compute import CountingDB, open_engine
from .jobs import Feed, Interrupts, check_prompt, done_before, explaining, interruptible
from .known import check_checkpoint
from .options import device_option, model_options, prompt_arguments, shared_option, store_options
from .output import count, duration, print_json, print_line, print_table, size
from .prompts import Asked, Line, as_asked, nothing_in, stream_prompts
from .texts import head

if TYPE_CHECKING:
    from promptdb.engine import Engine
    from promptdb.recorder import Recording

_SHOWN_PROMPTS = 20
_TEXT_WIDTH = 40
# Results of so many prompts are shown at once.
_WINDOW_PROMPTS = 16


def integers_option(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Read ``0,5,-1`` or ``0-11``; raises :class:`click.BadParameter`."""
    if value is None:
        return None
    found: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().lstrip("-").partition("-")
        try:
            if dash and not part.strip().startswith("-"):
                found += range(int(first), int(last) + 1)
            else:
                found.append(int(part))
        except ValueError:
            raise click.BadParameter(f"{part.strip()!r} is no number; 0,5,-1 and 0-11 are", ctx, param) from None
    return found


@click.command(short_help="Compute activations of prompts and store them.")
@prompt_arguments
@click.option(
    "--points",
    required=True,
    metavar="NAMES",
    help="What to record, separated by commas: post-mlp, attn-residual, ..., or paths of modules.",
)
@click.option(
    "--layers", metavar="N,...", callback=integers_option, help="Which layers: 0,5,-1 or 0-11; by default all."
)
@click.option("--as", "row_dtype", metavar="DTYPE", help="What rows are stored in, float16 for example.")
@model_options
@device_option
@shared_option
@store_options
def record(
    texts: Sequence[str],
    files: Sequence[str],
    points: str,
    layers: list[int] | None,
    row_dtype: str | None,
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    shared: str | None,
    path: str | None,
    as_json: bool,
) -> None:
    """Compute activations of prompts and store them.

    Prompts are given as for `promptdb put`, which stores the same keys and values; a prompt that is stored already
    runs only what lacks activations. The names of points are in docs/hooks.md. A job may be interrupted, and is gone on
    with by the same command.

    With --json: an object for each prompt, one a line.

    \b
    Examples:
      promptdb record --model demo --points post-mlp "Return the number of items"
      promptdb record --model demo --points post-mlp,attn-residual --layers 0,-1 --file prompts.jsonl
      promptdb record --model demo --points post-mlp --as float16 --file prompts.jsonl
    """
    names = [name.strip() for name in points.split(",") if name.strip()]
    for name in names:
        canonical_name(name)  # before a model is loaded for it
    prompts = stream_prompts(texts, files)
    done: list[int] = [0, 0, 0]  # prompts, tokens, tokens computed

    def interrupted() -> str:
        return f"{count(done[0], 'prompt')} recorded. What was computed is stored; the same command goes on from there."

    rows: list[tuple[str, ...]] = []
    with interruptible(interrupted) as interrupts:
        feed = Feed(prompts, interrupts, skip_bad=False, say=lambda text: click.echo(text, err=True))
        if not feed.begin(as_asked):
            raise nothing_in(files)
        check_checkpoint(model)
        began = perf_counter()
        with CountingDB(path, None, shared) as db, open_engine(db, model, dtype, device, namespace) as engine:
            load_s = perf_counter() - began
            interrupts.hold()
            before = db.stat()["blob_bytes"]
            with explaining(lambda: done_before(done[0], "prompt", "recorded")):
                for asked, found in _recorded(engine, feed, interrupts, names, layers, row_dtype):
                    done[0], done[1] = done[0] + 1, done[1] + len(found.token_ids)
                    done[2] += found.tokens_computed
                    _show(asked, found, rows, as_json=as_json)
                    if files and not as_json and done[0] % 1000 == 0:
                        click.echo(f"{done[0]:,} prompts, {done[2]:,} tokens computed", err=True)
            written = db.stat()["blob_bytes"] - before
            took_s = perf_counter() - began - load_s
        feed.finish(done_before(done[0], "prompt", "recorded"))
    if not done[0]:
        raise nothing_in(files)
    if as_json:
        return
    if done[0] > len(rows):
        rows.append((f"… {done[0] - len(rows):,} more", "", ""))
    if done[0] > 1:
        rows.append((f"{done[0]:,} prompts", f"{done[1]:,}", f"{done[2]:,}"))
    print_table(("prompt", ">tokens", ">computed"), rows)
    print_line(f"{db.path}: {size(max(0, written))} more. {duration(took_s)}, after {duration(load_s)} for the model.")


def _recorded(
    engine: Engine,
    feed: Feed[Asked | Line],
    interrupts: Interrupts,
    names: Sequence[str],
    layers: list[int] | None,
    row_dtype: str | None,
) -> Iterator[tuple[Asked, Recording]]:
    from promptdb.recorder import Recorder

    recorder = Recorder(engine, names, layers=layers, dtype=row_dtype)

    def parse(found: Asked | Line) -> tuple[Asked, Prompt]:
        asked = as_asked(found)
        try:
            return asked, check_prompt(engine, engine.tokenize(asked.pieces))
        except PromptError as error:
            asked.refuse(error)

    items = feed.items(parse)
    while window := list(islice(items, _WINDOW_PROMPTS)):

        def checked(window: list[tuple[Asked, Prompt]] = window) -> Iterator[Prompt]:
            for _, prompt in window:
                interrupts.check()
                yield prompt

        yield from zip((asked for asked, _ in window), recorder.run(checked()), strict=True)


def _show(asked: Asked, found: Recording, rows: list[tuple[str, ...]], *, as_json: bool) -> None:
    if as_json:
        document: dict[str, Any] = {
            "source": asked.place,
            "num_tokens": len(found.token_ids),
            "tokens_computed": found.tokens_computed,
            "points": [{"point": point, "layer": layer} for point, layer in found.points],
        }
        print_json(document)
    elif len(rows) < _SHOWN_PROMPTS:
        name = asked.place or head(asked.text, _TEXT_WIDTH)
        rows.append((name, f"{len(found.token_ids):,}", f"{found.tokens_computed:,}"))
