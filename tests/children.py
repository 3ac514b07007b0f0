"""Processes of their own that have everything imported: forked from the one that runs the tests, which has.

To import torch and transformers anew takes ten seconds. Where that is not what is tested, a fork will do.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import ClassVar

import torch


class Child:
    """A program in a forked process, with pipes to its standard input and output; its errors go where ours go.

    Parameters
    ----------
    code : the program; runs as ``__main__``.
    *args : what it finds in ``sys.argv[1:]``, as text.

    Attributes
    ----------
    stdin, stdout : text streams, from here.
    """

    _held: ClassVar[set[int]] = set()  # our ends of all pipes

    def __init__(self, code: str, *args: object) -> None:
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            # Without ours of all others, or nobody's input would end before all of us do.
            _run(code, args, theirs_in, theirs_out, {ours_in, ours_out, *self._held})
        os.close(theirs_in), os.close(theirs_out)
        self.stdin, self.stdout = os.fdopen(ours_in, "w"), os.fdopen(ours_out)
        self._held |= {ours_in, ours_out}
        self._input, self._status = ours_in, None

    def kill(self) -> None:
        """Kill the process, if it is still there."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait until the process has ended, and return its exit code, or minus the signal that killed it."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def read(self) -> str:
        """Give the process no more input, and return what it prints until it ends; it must not fail."""
        self._held.discard(self._input)
        self.stdin.close()
        text = self.stdout.read()
        assert self.wait() == 0
        return text

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        self._held -= {self._input, self.stdout.fileno()}
        self.stdout.close()
        with suppress(BrokenPipeError):
            self.stdin.close()


def _run(code: str, args: tuple[object, ...], stdin: int, stdout: int, not_ours: set[int]) -> None:
    status = 1
    try:
        for held in not_ours:
            os.close(held)
        os.dup2(stdin, 0), os.dup2(stdout, 1)
        sys.stdin, sys.stdout, sys.argv = os.fdopen(0), os.fdopen(1, "w"), ["-c", *map(str, args)]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # threads that were there before the fork are not there any more
        exec(compile(code, "<child>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        status = 0
    except SystemExit as ended:
        sys.stdout.flush()
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - whatever the program raises
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
