"""Prompts as the user gives them: arguments, standard input, files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click

from promptdb.errors import EmptyPromptError, PromptError, TextEncodingError

from .failure import Failure

STANDARD_INPUT = "-"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """What stands in one place: a line of a .jsonl file that is not blank, or the whole of another file.

    Attributes
    ----------
    data : its bytes.
    place : ``file:line`` or the file's name.
    number : of the line among all that were read, from 1; a file that is one text counts as one.
    """

    data: bytes
    place: str
    number: int
    is_json: bool

    def parse(self) -> Any:
        """Return the line's JSON; raises :class:`Failure` or :class:`TextEncodingError` with its place."""
        return _parse(self.data, self.place)


@dataclass(frozen=True)
class Asked:
    """One prompt: its pieces, and where it stands (``file:line``; empty for arguments)."""

    pieces: tuple[str, ...]
    place: str = ""
    number: int = 1

    @property
    def text(self) -> str:
        """The whole prompt."""
        return "".join(self.pieces)

    def refuse(self, error: PromptError) -> NoReturn:
        """Raise an error about this prompt, with the place where it stands."""
        raise at_place(error, self.place)


def at_place(error: PromptError, place: str) -> PromptError:
    """Return an error that names the place as well, or the same if there is none."""
    if not place:
        return error
    found = type(error)(f"{place}: {error.message}", error.hint)
    found.__cause__ = error
    return found


def read_prompts(texts: Sequence[str], files: Sequence[str]) -> list[Asked]:
    """Read everything that was asked for, before anything is computed.

    Parameters
    ----------
    texts : arguments, the pieces of one prompt; ``-`` stands for the text on standard input.
    files : names of files; ``.jsonl`` ones hold one prompt a line.

    Raises
    ------
    TextEncodingError, EmptyPromptError
        With file and line.
    Failure, click.UsageError
        A file that cannot be read, or nothing was asked for.
    """
    found = [as_asked(each) for each in stream_prompts(texts, files)]
    if not found:
        raise nothing_in(files)
    return found


def stream_prompts(texts: Sequence[str], files: Sequence[str]) -> Iterator[Asked | Line]:
    """Yield what was asked for while it is read: the arguments' prompt, then lines; see :func:`as_asked`.

    Parameters
    ----------
    files : ``-`` is standard input, one prompt a line as in a ``.jsonl`` file.

    Raises
    ------
    click.UsageError
        At once: nothing was asked for, or standard input twice.
    Failure, PromptError
        While iterating: a file cannot be read, or the arguments are no prompt.
    """
    check_inputs(texts, files)
    if not texts and not files:
        raise click.UsageError("Give a TEXT, '-' for standard input, or --file FILE.")
    return _stream(texts, files)


def check_inputs(texts: Sequence[str], files: Sequence[str]) -> None:
    """Raise :class:`click.UsageError` if standard input is asked for more than once."""
    if [*texts, *files].count(STANDARD_INPUT) > 1:
        raise click.UsageError("Standard input can be read once: give one '-'.")


def _stream(texts: Sequence[str], files: Sequence[str]) -> Iterator[Asked | Line]:
    if texts:
        yield Asked(argument_pieces(texts))
    yield from read_lines(files, 1 if texts else 0)


def as_asked(found: Asked | Line) -> Asked:
    """Return the prompt that stands in a line; raises :class:`Failure` or :class:`PromptError` with its place."""
    if isinstance(found, Asked):
        return found
    if found.is_json:
        return Asked(_pieces(found.parse(), found.place), found.place, found.number)
    if not found.data:
        raise EmptyPromptError(f"{found.place} is empty", "give at least one character")
    return Asked((_decode(found.data, found.place),), found.place, found.number)


def nothing_in(files: Sequence[str]) -> EmptyPromptError:
    """Return the error that files hold no prompt."""
    return EmptyPromptError(f"there are no prompts in {', '.join(files)}", "one JSON object a line")


def argument_pieces(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the pieces of the prompt that arguments are, standard input read; raises :class:`PromptError`."""
    pieces = [
        _read_stdin() if text == STANDARD_INPUT else checked(text, f"argument {number}")
        for number, text in enumerate(texts, 1)
    ]
    if not any(pieces):
        raise EmptyPromptError("the prompt is empty", "give at least one character")
    return tuple(pieces)


def read_lines(files: Sequence[str], before: int = 0, *, all_json: bool = False) -> Iterator[Line]:
    """Yield the lines of files that are not blank, in order. Memory: one line, or one file that is not ``.jsonl``.

    Parameters
    ----------
    files : ``-`` is standard input.
    before : lines that were read already, for the lines' numbers.
    all_json : every file holds an object a line, whatever its name.
    """
    for name in files:
        try:
            with _open(name) as stream:
                if not all_json and not _is_json(name):
                    before += 1
                    yield Line(stream.read(), name, before, is_json=False)
                    continue
                place = "standard input" if name == STANDARD_INPUT else name
                for number, data in enumerate(stream, 1):
                    before += 1
                    line = data.removeprefix(_BYTE_ORDER_MARK) if number == 1 else data
                    if line.strip():
                        yield Line(line, f"{place}:{number}", before, is_json=True)
        except OSError as error:
            raise Failure(f"{name} cannot be read: {error.strerror}", "check the file and its permissions") from error


def _is_json(name: str) -> bool:
    return name == STANDARD_INPUT or name.endswith(".jsonl")


def count_lines(files: Sequence[str], *, all_json: bool = False) -> int | None:
    """Return how far the numbers of :func:`read_lines` go, or None if a file is a pipe, which can be read once."""
    total = 0
    for name in files:
        if name == STANDARD_INPUT or not Path(name).is_file():
            return None
        if not all_json and not _is_json(name):
            total += 1
            continue
        last = b"\n"
        with Path(name).open("rb") as stream:
            while block := stream.read(1 << 20):
                total += block.count(b"\n")
                last = block[-1:]
        total += last != b"\n"
    return total


def _open(name: str) -> AbstractContextManager[BinaryIO]:
    return nullcontext(_stdin()) if name == STANDARD_INPUT else Path(name).open("rb")


def _stdin() -> BinaryIO:
    stream: BinaryIO | None = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise Failure("standard input is closed", "pipe a text into the command, or leave '-' out")
    return stream


def _read_stdin() -> str:
    return _decode(_stdin().read(), "standard input")


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(_decode(line, place, lines=False))
    except RecursionError as error:
        raise Failure(f"{place}: the JSON is nested too deeply") from error
    except ValueError as error:
        if isinstance(error, PromptError):
            raise
        raise Failure(f"{place}: this is not JSON: {error}", "a .jsonl file has one JSON object a line") from error


def _pieces(item: Any, place: str) -> tuple[str, ...]:
    example = 'write {"text": "..."} or {"pieces": ["...", "..."]}'
    if not isinstance(item, dict):
        raise Failure(f"{place}: a prompt is a JSON object, not {json_type(item)}", example)
    given = [key for key in ("text", "pieces") if key in item]
    if len(given) != 1:
        keys = ", ".join(map(repr, item)) or "nothing"
        wrong = "has both 'text' and 'pieces'" if given else f"has neither 'text' nor 'pieces', but {keys}"
        raise Failure(f"{place}: the object {wrong}", example)
    value = item[given[0]]
    pieces = [value] if given[0] == "text" else value
    if not isinstance(pieces, list):
        raise Failure(f"{place}: 'pieces' must be a list of strings, not {json_type(value)}", example)
    for piece in pieces:
        if not isinstance(piece, str):
            what = "'text' must be a string" if given[0] == "text" else "every piece must be a string"
            raise Failure(f"{place}: {what}, not {json_type(piece)}", example)
    if not any(pieces):
        raise EmptyPromptError(f"{place}: the prompt is empty", "give at least one character")
    return tuple(checked(piece, place) for piece in pieces)


def json_type(value: object) -> str:
    """Return what a value is called in JSON, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _decode(data: bytes, place: str, *, lines: bool = True) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        where = f"{place}, line {number}" if lines else place
        raise TextEncodingError(
            f"{where}: byte 0x{data[error.start]:02x} is not valid UTF-8", "convert the text to UTF-8"
        ) from error


def checked(text: str, place: str) -> str:
    """Return a text, if it is valid Unicode; raises :class:`TextEncodingError`."""
    # Bytes of an argument that are not UTF-8 arrive as surrogates, and JSON can spell them out.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextEncodingError(
            f"{place} is not valid Unicode at character {error.start + 1}", "write the text in UTF-8"
        ) from error
    return text
