"""Prompts as the user gives them: arguments, standard input, files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from promptdb.errors import EmptyPromptError, PromptError, TextEncodingError

from .failure import Failure


@dataclass(frozen=True)
class Asked:
    """One prompt: its pieces, and where it stands (``file:line``; empty for arguments)."""

    pieces: tuple[str, ...]
    place: str = ""

    @property
    def text(self) -> str:
        """The whole prompt."""
        return "".join(self.pieces)

    def refuse(self, error: PromptError) -> NoReturn:
        """Raise an error about this prompt, with the place where it stands."""
        if not self.place:
            raise error
        raise type(error)(f"{self.place}: {error.message}", error.hint) from error


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
    found: list[Asked] = []
    if texts:
        if texts.count("-") > 1:
            raise click.UsageError("Standard input can be read once: give one '-'.")
        pieces = [
            _read_stdin() if text == "-" else _checked(text, f"argument {number}")
            for number, text in enumerate(texts, 1)
        ]
        if not any(pieces):
            raise EmptyPromptError("the prompt is empty", "give at least one character")
        found.append(Asked(tuple(pieces)))
    for name in files:
        found += _read_file(name)
    if not found:
        if files:
            raise EmptyPromptError(f"there are no prompts in {', '.join(files)}", "one JSON object a line")
        raise click.UsageError("Give a TEXT, '-' for standard input, or --file FILE.")
    return found


def _read_stdin() -> str:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise Failure("standard input is closed", "pipe a text into the command, or leave '-' out")
    return _decode(stream.read(), "standard input")


def _read_file(name: str) -> Iterator[Asked]:
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise Failure(f"{name} cannot be read: {error.strerror}", "check the file and its permissions") from error
    if not name.endswith(".jsonl"):
        if not data:
            raise EmptyPromptError(f"{name} is empty", "give at least one character")
        yield Asked((_decode(data, name),), name)
        return
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            place = f"{name}:{number}"
            yield Asked(_pieces(_parse(line, place), place), place)


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
        raise Failure(f"{place}: a prompt is a JSON object, not {_json_type(item)}", example)
    given = [key for key in ("text", "pieces") if key in item]
    if len(given) != 1:
        keys = ", ".join(map(repr, item)) or "nothing"
        wrong = "has both 'text' and 'pieces'" if given else f"has neither 'text' nor 'pieces', but {keys}"
        raise Failure(f"{place}: the object {wrong}", example)
    value = item[given[0]]
    pieces = [value] if given[0] == "text" else value
    if not isinstance(pieces, list):
        raise Failure(f"{place}: 'pieces' must be a list of strings, not {_json_type(value)}", example)
    for piece in pieces:
        if not isinstance(piece, str):
            what = "'text' must be a string" if given[0] == "text" else "every piece must be a string"
            raise Failure(f"{place}: {what}, not {_json_type(piece)}", example)
    if not any(pieces):
        raise EmptyPromptError(f"{place}: the prompt is empty", "give at least one character")
    return tuple(_checked(piece, place) for piece in pieces)


def _json_type(value: object) -> str:
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


def _checked(text: str, place: str) -> str:
    # Bytes of an argument that are not UTF-8 arrive as surrogates, and JSON can spell them out.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextEncodingError(
            f"{place} is not valid Unicode at character {error.start + 1}", "write the text in UTF-8"
        ) from error
    return text
