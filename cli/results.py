"""Where results go, a JSON object a line: standard output, or a file that a later run can go on with."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from promptdb.hashing import FieldHasher
from promptdb.keys import Root

from .failure import Failure
from .output import _finite, print_json
from .prompts import STANDARD_INPUT, Line

_STDOUT = "-"


class Digest:
    """Digests lines together with all else that their results depend on: model, tokenizer, options."""

    def __init__(self, root: Root, **options: str | bool) -> None:
        self._root, self._options = root, options

    def __call__(self, line: Line) -> str:
        """Return 16 hexadecimal digits."""
        hasher = FieldHasher("promptdb result/1").field("root", self._root.digest)
        for name in sorted(self._options):
            hasher.field(name, self._options[name])
        return hasher.field("line", line.data.strip()).digest().hex()[:16]


class Results:
    """An open file of results, or standard output. Every line is written at once, so that a kill leaves whole lines
    and at most a half one."""

    def __init__(self, name: str, descriptor: int | None) -> None:
        self.name = name
        self._descriptor = descriptor
        self.num_written = 0

    @property
    def is_file(self) -> bool:
        """Whether it is a file, not standard output."""
        return self._descriptor is not None

    def write(self, document: Mapping[str, Any]) -> None:
        """Write one line."""
        if self._descriptor is None:
            print_json(document)
        else:
            data = (json.dumps(_finite(document), allow_nan=False) + "\n").encode()
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                raise Failure(f"{self.name} cannot be written: {error.strerror}", "--resume goes on with it") from error
        self.num_written += 1

    def resume(self, next_line: Callable[[], Line | None], digest: Callable[[Line], str]) -> tuple[int, int]:
        """Pass over the lines whose results are there, and cut off a half-written one.

        Returns
        -------
        tuple of int
            How many there are, and the number of the last.

        Raises
        ------
        Failure
            A result is not that of the line in its place, or there are more results than lines. Nothing was changed.
        """
        found = number = end = 0
        for document, position in self._complete_lines():
            found, end = found + 1, position
            line = next_line()
            if line is None:
                raise self._refusal(found, "the inputs end before it")
            if document.get("line") != line.number or document.get("digest") != digest(line):
                raise self._refusal(found, f"{line.place}, the model or an option is another than it was made with")
            number = line.number
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, end)
        os.lseek(self._descriptor, end, os.SEEK_SET)
        return found, number

    def _complete_lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield each line that ends, and the position after it in the file."""
        end = 0
        with Path(self.name).open("rb") as stream:
            for number, data in enumerate(stream, 1):
                if not data.endswith(b"\n"):
                    return
                end += len(data)
                try:
                    document = json.loads(data)
                except (ValueError, RecursionError):
                    document = None
                if not isinstance(document, dict):
                    raise self._refusal(number, "it is none of this command's results")
                yield document, end

    def _refusal(self, number: int, reason: str) -> Failure:
        return Failure(f"{self.name}:{number} cannot be resumed: {reason}", "--overwrite begins again")


@contextmanager
def open_results(name: str, inputs: Sequence[str], *, resume: bool, overwrite: bool) -> Iterator[Results]:
    """Open the file that results go to. An empty one counts as none.

    Parameters
    ----------
    name : of the file; ``-`` is standard output.
    inputs : files that are read, none of which may be this one.
    resume, overwrite : go on with a file that is there, or empty it; without either it is an error.
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    if name == _STDOUT:
        if resume or overwrite:
            raise click.UsageError("--resume and --overwrite need --out FILE.")
        yield Results("standard output", None)
        return
    path = Path(name)
    for each in inputs:
        if each != STANDARD_INPUT and path.exists() and path.samefile(each):
            raise Failure(f"{name} is what is read", "choose another file for --out")
    descriptor = _open(path)
    try:
        _claim(descriptor, name, resume=resume, overwrite=overwrite)
        yield Results(name, descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        hint = "create the directory, or choose another place" if not path.parent.is_dir() else "check its permissions"
        raise Failure(f"{path} cannot be written: {error.strerror}", hint) from error


def _claim(descriptor: int, name: str, *, resume: bool, overwrite: bool) -> None:
    """Make sure that nobody else writes the file, and that nothing in it is lost that should not be."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if overwrite:
            os.ftruncate(descriptor, 0)
    except BlockingIOError as error:
        raise Failure(f"another process is writing {name}", "wait for it, or choose another file") from error
    except OSError as error:
        raise Failure(f"{name} cannot be written: {error.strerror}", "choose another file") from error
    if not resume and os.fstat(descriptor).st_size:
        raise Failure(f"{name} exists", "--resume goes on with it, --overwrite begins again")
