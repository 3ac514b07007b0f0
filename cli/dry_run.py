"""``--dry-run``: what there is to compute, from the tokenizer and the store alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import click

from promptdb.checkpoint import describe, resolve
from promptdb.db import PromptDB
from promptdb.errors import IdentityError
from promptdb.forecast import Forecast, Sizes, forecast, way_of
from promptdb.keys import Root
from promptdb.opening import default_path
from promptdb.tokens import Encoder, Prompt

from .jobs import Feed, Interrupts
from .known import UnknownModelError, check_files, check_length, find_model, find_root, most_positions
from .output import count, duration, print_fields, print_json, print_line, size

Place = TypeVar("Place")
Tokenize = Callable[[tuple[str, ...]], Prompt]


@dataclass(frozen=True)
class _Subject:
    """What prompts are planned for. ``note`` says why nothing is known of the model, if so."""

    root: Root | None
    tokenize: Tokenize
    sizes: Sizes
    note: str = ""


def print_plan(
    lines: Iterator[Place],
    prompts_of: Callable[[Place, Tokenize], Iterable[Prompt]],
    *,
    skip_bad: bool,
    want_logits: bool,
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    path: str | None,
    as_json: bool,
) -> None:
    """Print what a job would do.

    Parameters
    ----------
    prompts_of : returns the prompts of a line, given what tokenises them.
    want_logits : as for :func:`promptdb.forecast.forecast`.
    """
    feed = Feed(lines, Interrupts(), skip_bad=skip_bad, say=lambda text: click.echo(text, err=True))
    with _open(path) as db:
        subject = _subject(db, model, dtype, namespace)
        fields = (db.registry.model(subject.root.weights_id) if db and subject.root else None) or {}
        # Where the model was run last, if nobody says where it will be.
        where = device or str(fields.get("probed_with", "")).rpartition(" on ")[2] or "cpu"
        plan = forecast(
            db,
            subject.root,
            chain.from_iterable(feed.items(lambda line: prompts_of(line, subject.tokenize))),
            sizes=subject.sizes,
            device_type=where.partition(":")[0],
            want_logits=want_logits,
        )
    feed.finish("")
    if as_json:
        is_known = subject.root is not None
        way = way_of(fields) if is_known else None
        more = {"way": way, "num_skipped": feed.num_skipped, "note": subject.note}
        print_json({"is_known_model": is_known, **asdict(plan), **more})
        return
    _print(plan, subject.note)


def _open(path: str | None) -> AbstractContextManager[PromptDB | None]:
    directory = default_path() if path is None else Path(path)
    is_new = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
    return nullcontext() if is_new and path != "" else PromptDB(path, readonly=True)


def _subject(db: PromptDB | None, model: str, dtype: str, namespace: str) -> _Subject:
    directory = resolve(model)
    config = describe(directory)
    sizes = Sizes.of_config(config, dtype)
    note, root = "There is no store yet.", None
    if db is not None:
        try:
            known = find_model(db, model, dtype, namespace)
            return _Subject(known.root, known.tokenize, sizes)
        except UnknownModelError as error:
            note = f"Nothing counts as stored, because {error.message}. {error.hint}."
        except IdentityError:  # a tokenizer that is not stored in a form that runs
            note, root = "", find_root(db, model, dtype, namespace)
    from .compute import load_tokenizer  # leads to transformers

    check_files(directory)
    encoder = Encoder(load_tokenizer(directory))

    def tokenize(pieces: tuple[str, ...]) -> Prompt:
        return check_length(encoder.encode(pieces), config["model_type"], most_positions(config))

    return _Subject(root, tokenize, sizes, note)


def _print(plan: Forecast, note: str) -> None:
    fields = {
        "prompts": f"{plan.num_prompts:,}, {count(plan.num_tokens, 'token')}, {plan.distinct_tokens:,} distinct",
        "stored": count(plan.stored_tokens, "token"),
        "to compute": "nothing",
    }
    if plan.tokens_to_compute:
        passes = "1 pass" if plan.num_passes == 1 else f"{plan.num_passes:,} passes"
        written = "of unknown size" if plan.bytes_to_write is None else size(plan.bytes_to_write)
        fields["to compute"] = f"{count(plan.tokens_to_compute, 'token')}, in about {passes}"
        fields["to write"] = f"about {count(plan.num_spans, 'span')}, {written}"
        fields["takes"] = (
            "not known yet: prompts of 32 tokens and more are measured"
            if plan.compute_s is None
            else f"{duration(plan.compute_s)}, at the rate measured last"
        )
    print_fields(fields)
    if note:
        print_line(note)
