"""How far a job is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from promptdb.keys import common_prefix

from .output import count, duration, styled

if TYPE_CHECKING:
    from promptdb.batch import Progress
    from promptdb.tokens import Prompt

_LOG_EVERY_S = 10.0
_SAMPLE_EVERY_S = 0.5
_RATE_OVER_S = 60.0


class Meter:
    """Counts lines and tokens of a job, and shows them on stderr. A context manager; not thread safe.

    Parameters
    ----------
    total : number of the last line, or None if nobody knows.
    is_shown : without it, it only counts.

    Attributes
    ----------
    num_done : lines that are finished, but for those that were not used.
    tokens_loaded : of prompts that are finished.
    tokens_computed : that went through the model, those of prompts that are not finished included.
    """

    def __init__(self, total: int | None, *, is_shown: bool) -> None:
        self.num_done = self.tokens_loaded = self.tokens_computed = 0
        self._total = total
        self._finished = self._handed = self._waiting = self._passed = 0
        self._last = b""
        self._is_shown = is_shown
        self._samples: deque[tuple[float, float, int]] = deque()
        self._logged = 0.0
        self._bar: Any = None

    def __enter__(self) -> Meter:
        if self._is_shown and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.add_task("", total=self._total, lines="", facts="")
            self._bar.start()
        self._logged = monotonic()
        self._sample()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Print a line on stderr, above the bar if there is one."""
        if self._bar is None:
            click.echo(text, err=True)
        else:
            self._bar.console.print(styled(text), soft_wrap=True)

    # What happens

    def begin_at(self, number: int) -> None:
        """Note that line ``number`` and all before it need no more work."""
        self._finished = number

    def handed(self, number: int, prompt: Prompt) -> None:
        """Note that a prompt of line ``number`` goes to the engine."""
        self._handed = number
        self._waiting += prompt.num_tokens - common_prefix(self._last, prompt.packed)
        self._last = prompt.packed

    def passed(self, progress: Progress) -> None:
        """Note what the engine reports."""
        self.tokens_computed += progress.tokens_computed
        self._passed += progress.tokens_computed + progress.tokens_loaded
        self._show()

    def finished(self, tokens_loaded: int) -> None:
        """Note that the results of a line are there, and how many of its tokens were loaded."""
        self.num_done += 1
        self.tokens_loaded += tokens_loaded
        # The engine gives results when it has those of all that it was handed.
        self._finished = max(self._finished, self._handed)
        self._waiting = self._passed = 0
        self._show()

    def so_far(self, noun: str) -> str:
        """Return what was done, for people."""
        if not self.num_done and not self.tokens_computed:
            return "nothing was computed yet"
        return f"{count(self.num_done, noun)} done, {count(self.tokens_computed, 'token')} computed"

    # What is seen

    @property
    def _done(self) -> float:
        """Lines that are finished, and the share of those at work that the tokens tell."""
        share = min(1.0, self._passed / self._waiting) if self._waiting else 0.0
        return self._finished + share * max(0, self._handed - self._finished)

    def _sample(self) -> bool:
        now = monotonic()
        if self._samples and now - self._samples[-1][0] < _SAMPLE_EVERY_S:
            return False
        self._samples.append((now, self._done, self.tokens_loaded + self.tokens_computed))
        while now - self._samples[0][0] > _RATE_OVER_S and len(self._samples) > 2:
            self._samples.popleft()
        return True

    def _show(self) -> None:
        if not self._is_shown or not self._sample():
            return
        lines, *facts = self._facts()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, lines=lines, facts=", ".join(facts))
        elif monotonic() - self._logged >= _LOG_EVERY_S:
            self._logged = monotonic()
            self.say(", ".join((lines, *facts)))

    def _facts(self) -> list[str]:
        """Return what to show, the most important first."""
        (then, done_then, tokens_then), (now, done, tokens) = self._samples[0], self._samples[-1]
        of = "" if self._total is None else f" of {self._total:,}"
        facts = [f"{done:,.0f}{of} lines"]
        if now > then:
            facts.append(f"{(tokens - tokens_then) / (now - then):,.0f} tokens/s")
            if self._total is not None and done > done_then:
                left_s = (self._total - done) * (now - then) / (done - done_then)
                facts.append(f"{duration(left_s)} left" if left_s >= 1 else "nearly done")
        return [*facts, f"{self.tokens_computed:,} computed", f"{self.tokens_loaded:,} loaded"]


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.fields[lines]}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=Console(stderr=True),
        transient=True,
        expand=True,
        # What the program prints is its output, and must not end up on stderr.
        redirect_stdout=False,
        redirect_stderr=False,
    )
