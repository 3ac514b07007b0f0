"""``promptdb warm --ray``: fill a team's store from the machines of a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import click

from promptdb.checkpoint import describe, resolve
from promptdb.db import PromptDB
from promptdb.errors import PromptError
from promptdb.opening import default_path
from promptdb.ray_jobs import compute, connected
from promptdb.shared_options import NONE, SharedOptions, stored_url, without_secrets
from promptdb.shares import split
from promptdb.tokenizer_identity import tokenizer_id
from promptdb.tokens import Encoder, Prompt
from promptdb.worker import Done

from .compute import load_tokenizer
from .failure import Failure
from .jobs import Feed, explaining, interruptible
from .known import check_files, check_length, most_positions
from .output import count, duration, print_json, print_line, size
from .prompts import Asked, Line, as_asked, nothing_in, stream_prompts

_TELL_EVERY_S = 10.0


def warm_on_ray(
    files: Sequence[str],
    model: str,
    shared: str | None,
    worker: Mapping[str, Any],
    address: str,
    num_workers: int | None,
    *,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Compute the prompts of files on a cluster.

    Parameters
    ----------
    worker : arguments of :class:`promptdb.worker.Worker`, but for the model, the tokenizer and the shared store.
    """
    began = perf_counter()
    total = Done(0, 0, 0, 0, 0, 0.0)

    def say(text: str) -> None:
        if not as_json:
            click.echo(text, err=True)

    def interrupted() -> str:
        return f"{_so_far(total)}. What was computed is stored; the same command goes on from there."

    with interruptible(interrupted) as interrupts:
        directory = resolve(model)
        check_files(directory)
        url = _shared_url(worker["path"], shared)
        feed = Feed(
            stream_prompts((), files), interrupts, skip_bad=skip_bad, say=lambda text: click.echo(text, err=True)
        )
        if not feed.begin(as_asked):
            raise nothing_in(files)
        tokenizer = load_tokenizer(directory)
        prompts = list(_prompts(feed, Encoder(tokenizer), describe(directory)))
        feed.finish("")
        if not prompts:
            raise nothing_in(files)
        num_tokens = split(prompts, 1).num_tokens
        say(f"{count(len(prompts), 'prompt')}, {num_tokens:,} distinct tokens")
        arguments = _everywhere(model, worker) | {"shared": url, "tokenizer_id": tokenizer_id(tokenizer)}
        # Ray prints what happens to its workers, and the output of the program must not hold it.
        with redirect_stdout(sys.stderr), connected(address), explaining(lambda: _so_far(total)):
            interrupts.hold()
            told = monotonic()
            for done in compute(prompts, arguments, num_workers=num_workers, say=say, check=interrupts.check):
                total = _added(total, done)
                if monotonic() - told >= _TELL_EVERY_S:
                    told = monotonic()
                    say(
                        f"{total.num_prompts:,} of {len(prompts):,} prompts, "
                        f"{total.tokens_computed + total.tokens_fetched:,} of {num_tokens:,} tokens"
                    )
    seconds = perf_counter() - began
    if as_json:
        more = {"elapsed_s": seconds, "num_skipped": feed.num_skipped, "distinct_tokens": num_tokens}
        print_json(asdict(total) | more | {"url": without_secrets(url)})
        return
    print_line(
        f"{count(total.num_prompts, 'prompt')}: {count(total.tokens_computed, 'token')} computed, "
        f"{count(total.tokens_fetched, 'token')} fetched, {size(total.bytes_sent)} sent, in {duration(seconds)}."
    )


def _prompts(feed: Feed[Asked | Line], encoder: Encoder, config: Mapping[str, Any]) -> Iterator[Prompt]:
    def parse(found: Asked | Line) -> Prompt:
        asked = as_asked(found)
        try:
            return check_length(encoder.encode(asked.pieces), config["model_type"], most_positions(config))
        except PromptError as error:
            asked.refuse(error)

    yield from feed.items(parse)


def _shared_url(path: str | None, shared: str | None) -> str:
    """Return the URL that is given, or that the store here has as its setting."""
    directory = default_path() if path is None else Path(path)
    if shared is None and directory.exists():
        with PromptDB(path, readonly=True) as db, db.read() as snapshot:
            shared = stored_url(snapshot.reader)
    if not shared or shared == NONE:
        raise Failure("no shared store is named", "give --shared URL, or `promptdb shared set URL`")
    SharedOptions.of_url(shared)
    return shared


def _everywhere(model: str, worker: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that mean the same in any working directory."""
    found = {"model": model, **worker}
    if Path(model).expanduser().is_dir():
        found["model"] = str(Path(model).expanduser().resolve())
    if worker["path"] is not None:
        found["path"] = str(Path(worker["path"]).absolute())
    return found


def _added(one: Done, other: Done) -> Done:
    return Done(*(getattr(one, field.name) + getattr(other, field.name) for field in fields(Done)))


def _so_far(total: Done) -> str:
    return f"{count(total.num_prompts, 'prompt')} done, {count(total.tokens_computed, 'token')} computed"
