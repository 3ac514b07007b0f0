"""``promptdb score``: how likely continuations are."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import click

from promptdb.db import PromptDB
from promptdb.tokens import Encoder

from .dry_run import print_plan
from .jobs import Feed, done_before, explaining, interruptible, job_options
from .known import check_checkpoint
from .options import device_option, model_options, shared_option, store_options
from .output import count, duration, print_json, print_line, print_table, probability
from .progress import Meter
from .prompts import Line, argument_pieces, check_inputs, count_lines, nothing_in, read_lines
from .questions import Question, as_question
from .results import open_results
from .scoring import How, Scoring, answer
from .texts import head, quoted, token_texts

_TEXT_WIDTH = 40


@click.command(short_help="Compute how likely continuations are.")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@job_options("Read a file with an object a line; '-' is standard input.")
@model_options
@device_option
@shared_option
@store_options
@click.option(
    "--out", metavar="FILE", default="-", help="Write a line for each line of --file; '-' is standard output."
)
@click.option("--resume", is_flag=True, help="Go on with the results that --out holds.")
@click.option("--overwrite", is_flag=True, help="Empty --out first.")
@click.option("--logprobs", is_flag=True, help="Give the log-probability of each token as well.")
@click.option(
    "--normalize",
    type=click.Choice(("none", "tokens", "bytes")),
    default="none",
    show_default=True,
    help="Divide the log-probabilities of choices by their lengths.",
)
@click.option("--no-store", is_flag=True, help="Do not store what is computed.")
def score(
    texts: Sequence[str],
    files: Sequence[str],
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    shared: str | None,
    path: str | None,
    as_json: bool,
    skip_bad: bool,
    dry_run: bool,
    out: str,
    resume: bool,
    overwrite: bool,
    logprobs: bool,
    normalize: str,
    no_store: bool,
) -> None:
    """Compute how likely continuations are.

    The last TEXT is scored, given all before it. A line of a file is one of

    \b
      {"context": "...", "continuation": "..."}
      {"context": "...", "choices": ["...", "..."]}
      {"pieces": ["...", "...", "..."]}, the last of which is scored

    and gives a line with the sum of the continuation's log-probabilities (in nats), its number of tokens, and whether
    each of them is the most likely one; for choices with those of each, their probabilities, and the best. An "id" is
    passed through. What is computed is stored and shared as by `promptdb put`, but for the logits after the last token.

    With --json and --out: a summary at the end.

    \b
    Examples:
      promptdb score --model demo "Return the number" " of items"
      promptdb score --model demo --file pairs.jsonl --out results.jsonl
      promptdb score --model demo --file pairs.jsonl --out results.jsonl --resume
      promptdb score --model demo --file pairs.jsonl --dry-run
    """
    if bool(texts) == bool(files):
        raise click.UsageError("Give a context and a continuation, or --file FILE.")
    check_inputs(texts, files)
    if texts and out != "-":
        raise click.UsageError("--out goes with --file.")
    given = _arguments(texts) if texts else None
    if dry_run:
        lines: Iterator[Question | Line] = iter([given]) if given else read_lines(files, all_json=True)
        print_plan(
            lines,
            lambda line, tokenize: [prompt for prompt, _ in as_question(line).pairs(tokenize)],
            skip_bad=skip_bad,
            want_logits=False,
            model=model,
            dtype=dtype,
            device=device,
            namespace=namespace,
            path=path,
            as_json=as_json,
        )
        return
    how = How(logprobs, normalize, store=not no_store)
    if given:
        check_checkpoint(model)
        from .compute import open_engine  # leads to torch

        with PromptDB(path, shared=shared) as db, open_engine(db, model, dtype, device, namespace) as engine:
            document = answer(engine, given, how)
            if as_json:
                print_json(document)
            else:
                _print_answer(document, given, engine.encoder)
        return
    _score_files(files, model, dtype, device, namespace, shared, path, as_json, skip_bad, out, resume, overwrite, how)


def _arguments(texts: Sequence[str]) -> Question:
    *context, continuation = argument_pieces(texts)
    if not context:
        raise click.UsageError("Give a context and then a continuation: two TEXTs or more.")
    return Question(tuple(context), (continuation,))


def _score_files(
    files: Sequence[str],
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    shared: str | None,
    path: str | None,
    as_json: bool,
    skip_bad: bool,
    out: str,
    resume: bool,
    overwrite: bool,
    how: How,
) -> None:
    meter = Meter(count_lines(files, all_json=True), is_shown=out != "-" or not sys.stdout.isatty())

    def interrupted() -> str:
        command = "the same command" if out == "-" else "the same command with --resume"
        return f"{meter.so_far('line')}; {command} goes on from there."

    began = perf_counter()
    with (
        interruptible(interrupted) as interrupts,
        open_results(out, files, resume=resume, overwrite=overwrite) as results,
    ):
        feed = Feed(read_lines(files, all_json=True), interrupts, skip_bad=skip_bad, say=meter.say)
        if not feed.begin(as_question):
            raise nothing_in(files)
        check_checkpoint(model)
        from .compute import open_engine  # leads to torch

        with PromptDB(path, shared=shared) as db, open_engine(db, model, dtype, device, namespace) as engine:
            load_s = perf_counter() - began
            interrupts.hold()
            scoring = Scoring(engine, feed, results, how, meter, interrupts)
            if resume:
                scoring.resume()
            with meter, explaining(lambda: done_before(meter.num_done, "line", "done")):
                scoring.run()
        feed.finish(done_before(meter.num_done, "line", "done"))
    summary = {
        "out": out,
        "num_lines": results.num_written,
        "num_resumed": scoring.num_resumed,
        "num_skipped": feed.num_skipped,
        "tokens_loaded": meter.tokens_loaded,
        "tokens_computed": meter.tokens_computed,
        "load_model_s": load_s,
        "elapsed_s": perf_counter() - began - load_s,
    }
    if results.is_file and as_json:
        print_json(summary)
    else:
        click.echo(_summary(summary), err=not results.is_file)


def _summary(done: dict[str, Any]) -> str:
    lines = f"{done['out']}: " if done["out"] != "-" else ""
    lines += count(done["num_lines"], "line")
    if done["num_resumed"]:
        lines += f", after {done['num_resumed']:,} that were there"
    if done["num_skipped"]:
        lines += f"; {done['num_skipped']:,} of them cannot be used"
    tokens = f"{count(done['tokens_loaded'], 'token')} loaded, {done['tokens_computed']:,} computed"
    return (
        f"{lines}. {tokens}. {duration(done['elapsed_s'])}, "
        f"after {duration(done['load_model_s'])} for loading the model."
    )


def _print_answer(document: dict[str, Any], question: Question, encoder: Encoder) -> None:
    """Print the score of one continuation as a table, and its tokens if they were asked for."""
    row = (
        head(question.continuations[0], _TEXT_WIDTH),
        f"{document['num_tokens']:,}",
        _number(document["logprob_nats"]),
        _probability(document["logprob_nats"]),
        {True: "yes", False: "no", None: "?"}[document["is_greedy"]],
        f"{document['tokens_loaded']:,}",
        f"{document['tokens_computed']:,}",
    )
    columns = ("continuation", ">tokens", ">log-probability", ">probability", "greedy", ">loaded", ">computed")
    print_table(columns, [row])
    if "token_ids" in document:
        print_line("")
        texts = token_texts(encoder, document["token_ids"])
        rows = [
            (quoted(text), str(token), _number(logprob), _probability(logprob))
            for text, token, logprob in zip(texts, document["token_ids"], document["token_logprobs_nats"], strict=True)
        ]
        print_table(("token", ">ID", ">log-probability", ">probability"), rows)


def _number(logprob: float) -> str:
    return f"{logprob:.3f}"


def _probability(logprob: float) -> str:
    return probability(math.exp(logprob))
