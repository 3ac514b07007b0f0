"""``promptdb put``: compute prompts and store them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import click

from promptdb.commits import PutReport
from promptdb.errors import PromptError

from .compute import CountingDB, open_engine
from .known import check_checkpoint
from .options import device_option, model_options, prompt_arguments, store_options
from .output import count, duration, print_json, print_line, print_table, size
from .prompts import Asked, read_prompts
from .texts import head

if TYPE_CHECKING:
    from promptdb.engine import Engine

_SHOWN_PROMPTS = 20
_TEXT_WIDTH = 40


@dataclass(frozen=True)
class PutResult:
    """What became of one prompt."""

    source: str
    num_tokens: int
    tokens_loaded: int
    tokens_computed: int
    elapsed_s: float
    spans_written: int
    tokens_written: int
    bytes_written: int


@click.command(short_help="Compute prompts and store their representations.")
@prompt_arguments
@model_options
@device_option
@store_options
def put(
    texts: Sequence[str],
    files: Sequence[str],
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    path: str | None,
    as_json: bool,
) -> None:
    """Compute prompts and store their representations.

    All TEXTs together are one prompt; each is a piece of it, after which the prompt may be continued otherwise. '-'
    stands for the text on standard input, taken as it is, with its last newline. What is stored already is loaded, not
    computed. Texts that start with '-' go after '--'.

    With --json: an object for each prompt, one a line, once everything is stored.

    \b
    Examples:
      promptdb put --model demo "Return the number" " of items" " in the list"
      promptdb put --model demo --file prompts.jsonl
      cat notes.txt | promptdb put --model demo -
    """
    prompts = read_prompts(texts, files)
    check_checkpoint(model)
    began = perf_counter()
    done: list[tuple[bytes, int, float]] = []  # packed tokens, tokens computed, seconds
    with CountingDB(path) as db:
        with open_engine(db, model, dtype, device, namespace) as engine:
            load_s = perf_counter() - began
            for asked in _with_progress(prompts):
                done.append(_put(engine, asked, len(done)))
        store_s = perf_counter() - began - load_s
        written = db.written()
    results = [
        _result(asked, packed, computed, elapsed_s, written.pop(packed, PutReport()))
        for asked, (packed, computed, elapsed_s) in zip(prompts, done, strict=True)
    ]
    if as_json:
        for result in results:
            print_json(asdict(result))
        return
    _print_results(prompts, results)
    spans, num_bytes = sum(each.spans_written for each in results), sum(each.bytes_written for each in results)
    what = f"wrote {count(spans, 'span')}, {size(num_bytes)}" if spans else "nothing new to write"
    print_line(f"{db.path}: {what}. {duration(store_s)}, after {duration(load_s)} for loading the model.")


def _put(engine: Engine, asked: Asked, num_done: int) -> tuple[bytes, int, float]:
    began = perf_counter()
    try:
        prompt = engine.tokenize(asked.pieces)
        representation = engine.get(prompt)
    except PromptError as error:
        if num_done:
            before = f"{count(num_done, 'prompt')} before it {'is' if num_done == 1 else 'are'} stored"
            error.hint = f"{error.hint}; {before}" if error.hint else before
        asked.refuse(error)
    return prompt.packed, representation.tokens_computed, perf_counter() - began


def _result(asked: Asked, packed: bytes, computed: int, elapsed_s: float, written: PutReport) -> PutResult:
    total = len(packed) // 4
    return PutResult(
        asked.place,
        total,
        total - computed,
        computed,
        elapsed_s,
        written.num_spans,
        written.num_tokens,
        written.num_bytes,
    )


def _with_progress(prompts: Sequence[Asked]) -> Iterable[Asked]:
    """Iterate with a progress bar on stderr, if it is a terminal and there are several prompts."""
    if len(prompts) < 2 or not sys.stderr.isatty():
        return prompts
    return _tracked(prompts)


def _tracked(prompts: Sequence[Asked]) -> Iterator[Asked]:
    from rich.console import Console
    from rich.progress import track

    yield from track(prompts, description="prompts", console=Console(stderr=True), transient=True)


def _print_results(prompts: Sequence[Asked], results: Sequence[PutResult]) -> None:
    rows = [
        (
            result.source or head(asked.text, _TEXT_WIDTH),
            f"{result.num_tokens:,}",
            f"{result.tokens_loaded:,}",
            f"{result.tokens_computed:,}",
            duration(result.elapsed_s),
        )
        for asked, result in zip(prompts, results, strict=True)
    ]
    if len(rows) > _SHOWN_PROMPTS:
        more = len(rows) - _SHOWN_PROMPTS + 1
        rows[_SHOWN_PROMPTS - 1 :] = [(f"… {more:,} more", "", "", "", "")]
    if len(results) > 1:
        rows.append(
            (
                f"{len(results):,} prompts",
                f"{sum(result.num_tokens for result in results):,}",
                f"{sum(result.tokens_loaded for result in results):,}",
                f"{sum(result.tokens_computed for result in results):,}",
                duration(sum(result.elapsed_s for result in results)),
            )
        )
    print_table(("prompt", ">tokens", ">loaded", ">computed", ">time"), rows)
