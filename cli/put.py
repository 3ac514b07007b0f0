"""``promptdb put``: compute prompts and store them."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from time import perf_counter
from typing import TYPE_CHECKING

import click

from promptdb.errors import PromptError
from promptdb.labels import check_name
from promptdb.tokens import Prompt

from .compute import CountingDB, open_engine
from .dry_run import print_plan
from .jobs import Feed, Interrupts, check_prompt, done_before, explaining, interruptible, job_options
from .known import check_checkpoint
from .lifetime import apply_lifetime
from .options import (
    device_option,
    kv_codec_option,
    lifetime_options,
    model_options,
    shared_option,
    store_options,
)
from .output import count, duration, print_json, print_line, print_table, size
from .progress import Meter
from .prompts import Asked, Line, as_asked, count_lines, nothing_in, stream_prompts
from .texts import head

if TYPE_CHECKING:
    from promptdb.batch import Progress
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
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@job_options(
    'Read prompts: a .jsonl file has objects with "text" or "pieces", as standard input has as "-"; any other file is '
    "one text."
)
@model_options
@kv_codec_option
@device_option
@lifetime_options
@shared_option
@store_options
def put(
    texts: Sequence[str],
    files: Sequence[str],
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    kv_codec: str | None,
    tag: str | None,
    ttl_s: float | None,
    shared: str | None,
    path: str | None,
    as_json: bool,
    skip_bad: bool,
    dry_run: bool,
) -> None:
    """Compute prompts and store their representations.

    All TEXTs together are one prompt; each is a piece of it, after which the prompt may be continued otherwise. '-'
    stands for the text on standard input, taken as it is, with its last newline. What is stored already is loaded, not
    computed; what prompts share is computed once. Texts that start with '-' go after '--'.

    A job may be interrupted, and is gone on with by the same command. A line that cannot be used ends it, with all
    before it stored, unless --skip-bad is given.

    With --json: an object for each prompt, one a line, as soon as the prompt is stored.

    \b
    Examples:
      promptdb put --model demo "Return the number" " of items" " in the list"
      promptdb put --model demo --file prompts.jsonl
      promptdb put --model demo --file prompts.jsonl --dry-run
      promptdb put --model demo --file prompts.jsonl --tag evaluation --ttl 7d
      cat notes.txt | promptdb put --model demo -
    """
    if tag is not None:
        check_name(tag, may_be_empty=False)
    prompts = stream_prompts(texts, files)
    if dry_run and kv_codec is not None:
        raise click.UsageError("--dry-run does not plan for --kv-codec")
    if dry_run:
        print_plan(
            prompts,
            lambda found, tokenize: [_tokenized(as_asked(found), tokenize)],
            skip_bad=skip_bad,
            want_logits=True,
            model=model,
            dtype=dtype,
            device=device,
            namespace=namespace,
            path=path,
            as_json=as_json,
        )
        return
    total = count_lines(files)
    shown = bool(files) and not (as_json and sys.stdout.isatty())
    meter = Meter(None if total is None else total + bool(texts), is_shown=shown)

    def interrupted() -> str:
        return f"{meter.so_far('prompt')}. What was computed is stored; the same command goes on from there."

    table = _Table()
    with interruptible(interrupted) as interrupts:
        feed = Feed(prompts, interrupts, skip_bad=skip_bad, say=meter.say)
        if not feed.begin(as_asked):
            raise nothing_in(files)
        check_checkpoint(model)
        began = perf_counter()
        with CountingDB(path, ttl_s, shared) as db:
            with open_engine(db, model, dtype, device, namespace, kv_codec) as engine:
                load_s = perf_counter() - began
                interrupts.hold()
                with meter, explaining(lambda: done_before(meter.num_done, "prompt", "stored")):
                    for name, result in _results(engine, db, feed, meter, interrupts, tag):
                        table.add(name, result)
                        if as_json:
                            print_json(asdict(result))
            store_s = perf_counter() - began - load_s
        feed.finish(done_before(meter.num_done, "prompt", "stored"))
    if not meter.num_done:
        raise nothing_in(files)
    if as_json:
        return
    table.print()
    skipped = f" {count(feed.num_skipped, 'line')} skipped." if feed.num_skipped else ""
    print_line(
        f"{db.path}: {table.written}.{skipped} {duration(store_s)}, after {duration(load_s)} for loading the model."
    )


def _tokenized(asked: Asked, tokenize: Callable[[tuple[str, ...]], Prompt]) -> Prompt:
    try:
        return tokenize(asked.pieces)
    except PromptError as error:
        asked.refuse(error)


def _results(
    engine: Engine,
    db: CountingDB,
    feed: Feed[Asked | Line],
    meter: Meter,
    interrupts: Interrupts,
    tag: str | None,
) -> Iterator[tuple[str, PutResult]]:
    """Compute the prompts of a feed; yield what to call each, and its result, once it is stored."""
    waiting: deque[tuple[Asked, Prompt]] = deque()  # those that the engine has taken

    def parse(found: Asked | Line) -> tuple[Asked, Prompt]:
        asked = as_asked(found)
        return asked, _tokenized(asked, lambda pieces: check_prompt(engine, engine.tokenize(pieces)))

    def prompts() -> Iterator[Prompt]:
        for asked, prompt in feed.items(parse):
            waiting.append((asked, prompt))
            meter.handed(asked.number, prompt)
            yield prompt

    def on_progress(progress: Progress) -> None:
        meter.passed(progress)
        interrupts.check()

    for found in engine.run(prompts(), on_progress=on_progress):
        engine.flush()
        asked, prompt = waiting.popleft()
        meter.finished(found.tokens_loaded)
        written = db.claim(prompt.packed)
        # What was written just now has its time to live, and gave it to what it stands on.
        apply_lifetime(db, engine.root, prompt.packed, tag=tag, ttl_s=None if written.num_spans else db.ttl_s)
        yield (
            asked.place or head(asked.text, _TEXT_WIDTH),
            PutResult(
                asked.place,
                found.num_tokens,
                found.tokens_loaded,
                found.tokens_computed,
                found.lookup_s + found.load_s + found.compute_s + found.store_s,
                written.num_spans,
                written.num_tokens,
                written.num_bytes,
            ),
        )


class _Table:
    """Rows of the first prompts, and the sum of all."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, ...]] = []
        self._num_prompts = 0
        self._sum = PutResult("", 0, 0, 0, 0.0, 0, 0, 0)

    def add(self, name: str, result: PutResult) -> None:
        """Take the result of one prompt."""
        self._num_prompts += 1
        sums = {each.name: getattr(self._sum, each.name) + getattr(result, each.name) for each in fields(PutResult)}
        self._sum = PutResult(**{**sums, "source": ""})
        if self._num_prompts <= _SHOWN_PROMPTS:
            self._rows.append(_row(name, result))

    def print(self) -> None:
        """Print the table."""
        rows = list(self._rows)
        if self._num_prompts > _SHOWN_PROMPTS:
            more = self._num_prompts - _SHOWN_PROMPTS + 1
            rows[_SHOWN_PROMPTS - 1 :] = [(f"… {more:,} more", "", "", "", "")]
        if self._num_prompts > 1:
            rows.append(_row(f"{self._num_prompts:,} prompts", self._sum))
        print_table(("prompt", ">tokens", ">loaded", ">computed", ">time"), rows)

    @property
    def written(self) -> str:
        """What was written, for people."""
        if not self._sum.bytes_written:
            return "nothing new to write"
        return f"wrote {count(self._sum.spans_written, 'span')}, {size(self._sum.bytes_written)}"


def _row(name: str, result: PutResult) -> tuple[str, ...]:
    return (
        name,
        f"{result.num_tokens:,}",
        f"{result.tokens_loaded:,}",
        f"{result.tokens_computed:,}",
        duration(result.elapsed_s),
    )
