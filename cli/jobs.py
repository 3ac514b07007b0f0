"""What long jobs share: options, lines that are read as they are needed, and stopping without loss."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from promptdb.errors import PromptDBError, PromptError, PromptTooLongError, TokenRangeError
from promptdb.keys import unpack_tokens

from .failure import Failure
from .output import count

if TYPE_CHECKING:
    from promptdb.engine import Engine
    from promptdb.tokens import Prompt

Command = TypeVar("Command", bound=Callable[..., Any])
Place = TypeVar("Place")
Item = TypeVar("Item")

# After these a job may go on later; SIGHUP is what a terminal that is closed sends.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_NOTICE = b"\nStopping after what runs now; once more stops at once, and loses it.\n"


def job_options(file_help: str) -> Callable[[Command], Command]:
    """Return what adds ``--file`` (as ``files``), ``--skip-bad`` and ``--dry-run``."""

    def add(command: Command) -> Command:
        command = click.option(
            "--dry-run", is_flag=True, help="Print what there is to compute, and compute nothing. Loads no weights."
        )(command)
        command = click.option(
            "--skip-bad", is_flag=True, help="Report lines that cannot be used, and go on with the next."
        )(command)
        files = click.Path(exists=True, dir_okay=False, allow_dash=True)
        return click.option("--file", "files", multiple=True, metavar="FILE", type=files, help=file_help)(command)

    return add


class Interrupted(KeyboardInterrupt):
    """A signal ends the job. ``exit_code`` is what a shell reports for a process that the signal ended."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


class Interrupts:
    """Turns signals that end a process into :class:`Interrupted`. A context manager, for the main thread.

    It is raised at once, until :meth:`hold` is called; from then on :meth:`check` raises it, so that nothing that was
    computed is lost, or the second signal does, wherever the program is.
    """

    def __init__(self) -> None:
        self.num_signals = 0
        self._is_held = False
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                # One that is ignored (nohup, a job in the background) stays so.
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.num_signals += 1
        if not self._is_held or self._number:
            raise Interrupted(number)
        self._number = number
        with suppress(OSError):
            os.write(2, _NOTICE)

    def hold(self) -> None:
        """From now on, let the first signal wait for :meth:`check`."""
        self._is_held = True

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal has come."""
        if self._number:
            raise Interrupted(self._number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal interrupts at once: for waiting for input, which may never come."""
        held, self._is_held = self._is_held, False
        try:
            self.check()
            yield
        finally:
            self._is_held = held


@contextmanager
def interruptible(describe: Callable[[], str]) -> Iterator[Interrupts]:
    """Run a job; when a signal ended it, and everything in it is closed, say what was done, and exit 130 or 143.

    Parameters
    ----------
    describe : returns what was done, and how to go on.
    """
    interrupts = Interrupts()
    try:
        with interrupts:
            yield interrupts
    except Interrupted as stopped:
        lost = "" if interrupts.num_signals == 1 else " What was not stored yet is lost."
        click.echo(f"\nInterrupted: {describe()}{lost}", err=True)
        raise click.exceptions.Exit(stopped.exit_code) from None


class Feed(Generic[Place]):
    """The lines of a job, read as they are needed, and what becomes of those that cannot be used.

    A bad line ends the iteration, so that what came before it is still computed; :meth:`finish` raises what was wrong.
    Or it is reported and left out.

    Parameters
    ----------
    lines : read one by one; an error while reading ends the job.
    skip_bad : go on after bad lines.
    say : prints a line about the job.

    Attributes
    ----------
    skipped : called with each line that is left out, and the reason.
    num_skipped : how many were.
    """

    def __init__(
        self,
        lines: Iterator[Place],
        interrupts: Interrupts,
        *,
        skip_bad: bool,
        say: Callable[[str], None],
    ) -> None:
        self._lines, self._interrupts = lines, interrupts
        self._skip_bad, self._say = skip_bad, say
        self.skipped: Callable[[Place, str], None] = lambda line, reason: None
        self._waiting: list[Place] = []
        self._error: PromptError | Failure | None = None
        self.num_skipped = 0

    def begin(self, parse: Callable[[Place], object]) -> bool:
        """Look at the first line, before a model is loaded for it; return whether there is any.

        Raises
        ------
        PromptError, Failure
            It is bad, and bad lines are not skipped.
        """
        line = self.next_line()
        if line is None:
            return False
        self._waiting.append(line)
        if not self._skip_bad:
            parse(line)
        return True

    def next_line(self) -> Place | None:
        """Return the next line, whatever it is, or None after the last."""
        if self._waiting:
            return self._waiting.pop()
        with self._interrupts.at_once():
            return next(self._lines, None)

    def items(self, parse: Callable[[Place], Item]) -> Iterator[Item]:
        """Yield what lines are parsed into."""
        while True:
            try:
                line = self.next_line()
            except (PromptError, Failure) as error:
                self._error = error
                return
            if line is None:
                return
            try:
                item = parse(line)
            except (PromptError, Failure) as error:
                if not self._skip_bad:
                    self._error = error
                    return
                self.num_skipped += 1
                self._say(f"Skipped {error.message}")
                self.skipped(line, error.message)
                continue
            yield item

    def finish(self, done: str) -> None:
        """Raise what ended the iteration before its time, with a hint that says what was done before."""
        if self._error is not None:
            raise _with_hint(self._error, done)


def _with_hint(error: Any, hint: str) -> Any:
    if hint:
        error.hint = f"{error.hint}; {hint}" if error.hint else hint
    return error


def done_before(number: int, noun: str, what: str) -> str:
    """Return ``3 prompts before it are stored``, or nothing if there were none."""
    return f"{count(number, noun)} before it {'is' if number == 1 else 'are'} {what}" if number else ""


@contextmanager
def explaining(done: Callable[[], str]) -> Iterator[None]:
    """Add to the hint of any error what was done before it."""
    try:
        yield
    except (PromptDBError, Failure) as error:
        _with_hint(error, done())
        raise


def check_prompt(engine: Engine, prompt: Prompt) -> Prompt:
    """Return a prompt, if the model can compute it: a batch that holds another is refused as a whole.

    Raises
    ------
    PromptTooLongError, TokenRangeError
        As :meth:`Engine.get` does.
    """
    total, most = prompt.num_tokens, engine.max_tokens
    model_type = engine.model.config.model_type
    if most is not None and total > most:
        raise PromptTooLongError(
            f"the prompt has {total} tokens; this {model_type} computes {most} positions exactly", "shorten the prompt"
        )
    largest, vocabulary = max(unpack_tokens(prompt.packed)), engine.model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise TokenRangeError(
            f"token ID {largest} is outside the model's vocabulary of {vocabulary}",
            "is this the model's own tokenizer?",
        )
    return prompt
