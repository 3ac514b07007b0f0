"""The work of ``promptdb score``: from questions to one document each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from promptdb.errors import PromptError
from promptdb.keys import unpack_tokens
from promptdb.tokens import Prompt

from .jobs import Feed, Interrupts, check_prompt
from .progress import Meter
from .prompts import Line, at_place
from .questions import Question, as_question
from .results import Digest, Results

if TYPE_CHECKING:
    from promptdb.batch import Progress
    from promptdb.engine import Engine
    from promptdb.scoring import Score

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class How:
    """What the results hold, and whether what is computed is stored."""

    logprobs: bool
    normalize: str
    store: bool


@dataclass
class _Waiting:
    """A line whose scores are not all there."""

    document: dict[str, Any]
    question: Question | None  # None: the document is complete
    scores: list[Score] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        return self.question is None or len(self.scores) == len(self.question.continuations)


class Scoring:
    """Scores the lines of a file: one document each, in their order.

    Memory: what the engine takes at once, whatever the number of lines.
    """

    def __init__(
        self, engine: Engine, feed: Feed[Line], results: Results, how: How, meter: Meter, interrupts: Interrupts
    ) -> None:
        self._engine, self._feed, self._results, self._how = engine, feed, results, how
        self._meter, self._interrupts = meter, interrupts
        self._digest = Digest(engine.root, normalize=how.normalize, logprobs=how.logprobs)
        self._waiting: deque[_Waiting] = deque()
        self.num_resumed = 0

    def resume(self) -> None:
        """Pass over the lines whose results are there; raises as :meth:`Results.resume` does."""
        self.num_resumed, number = self._results.resume(self._feed.next_line, self._digest)
        self._meter.begin_at(number)

    def run(self) -> None:
        """Score all lines, and write each as soon as it and those before it are done."""
        self._feed.skipped = self._skipped
        for found in self._engine.score(self._pairs(), store=self._how.store, on_progress=self._on_progress):
            self._write()  # of what was skipped before it
            self._waiting[0].scores.append(found)
            self._write()
        self._write()

    def _pairs(self) -> Iterator[Pair]:
        for line, question, pairs in self._feed.items(self._parse):
            self._waiting.append(_Waiting(self._header(line, question.passed_through), question))
            for prompt, num_context in pairs:
                self._meter.handed(line.number, prompt)
                token_ids = unpack_tokens(prompt.packed)
                # As token IDs, so that nothing is tokenised twice.
                yield token_ids[:num_context], token_ids[num_context:]

    def _parse(self, line: Line) -> tuple[Line, Question, list[tuple[Prompt, int]]]:
        question = as_question(line)
        pairs = question.pairs(self._engine.tokenize)
        try:
            for prompt, _ in pairs:
                check_prompt(self._engine, prompt)
        except PromptError as error:
            raise at_place(error, question.place) from error
        return line, question, pairs

    def _on_progress(self, progress: Progress) -> None:
        self._meter.passed(progress)
        self._interrupts.check()

    def _skipped(self, line: Line, reason: str) -> None:
        self._waiting.append(_Waiting({**self._header(line, {}), "error": reason}, None))

    def _header(self, line: Line, passed_through: dict[str, Any]) -> dict[str, Any]:
        return {"line": line.number, "digest": self._digest(line), **passed_through}

    def _write(self) -> None:
        while self._waiting and self._waiting[0].is_ready:
            done = self._waiting.popleft()
            if done.question is None:
                self._results.write(done.document)
                continue
            self._results.write({**done.document, **describe(done.question, done.scores, self._how)})
            self._meter.finished(sum(each.tokens_loaded for each in done.scores))


def answer(engine: Engine, question: Question, how: How) -> dict[str, Any]:
    """Score one question and return its document, with how many tokens were loaded and computed for it."""
    for prompt, _ in question.pairs(engine.tokenize):
        check_prompt(engine, prompt)
    scores = list(engine.score([(question.context, each) for each in question.continuations], store=how.store))
    return {
        **describe(question, scores, how),
        "tokens_loaded": sum(each.tokens_loaded for each in scores),
        "tokens_computed": sum(each.tokens_computed for each in scores),
    }


def describe(question: Question, scores: Sequence[Score], how: How) -> dict[str, Any]:
    """Return what is printed of the scores of a question's continuations."""
    if not question.has_choices:
        return _fields(scores[0], how)
    weights = [
        each.logprob / _length(each, text, how.normalize)
        for each, text in zip(scores, question.continuations, strict=True)
    ]
    highest = max(weights)
    shares = [math.exp(weight - highest) if weight > -math.inf else 0.0 for weight in weights]
    total = sum(shares)
    probabilities = [share / total if total else math.nan for share in shares]
    best = max(range(len(weights)), key=weights.__getitem__)
    choices = [
        {"choice": text, "probability": share, **_fields(each, how)}
        for text, share, each in zip(question.continuations, probabilities, scores, strict=True)
    ]
    return {"best": question.continuations[best], "choices": choices}


def _length(found: Score, text: str, normalize: str) -> int:
    return {"none": 1, "tokens": len(found.token_ids), "bytes": len(text.encode())}[normalize]


def _fields(found: Score, how: How) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "logprob_nats": found.logprob,
        "num_tokens": len(found.token_ids),
        "is_greedy": found.is_greedy,
    }
    if how.logprobs:
        fields["token_ids"] = list(found.token_ids)
        fields["token_logprobs_nats"] = found.token_logprobs.tolist()
    return fields
