"""What people and programs see: tables on a terminal, aligned text in a pipe, JSON when it is asked for.

rich is imported on a terminal only: it costs more than most commands.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from .failure import Failure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def _write(line: str) -> None:
    try:
        click.echo(line)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(f"the output cannot be written: {error.strerror}") from error


def is_terminal() -> bool:
    """Whether a person looks at the output."""
    return sys.stdout.isatty()


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on one line. Numbers that JSON does not have become null."""
    _write(json.dumps(_finite(document), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def print_line(*parts: str | tuple[str, str]) -> None:
    """Print a line made of strings and (string, style) pairs; styles show on a terminal only."""
    if is_terminal():
        _console().print(styled(*parts), soft_wrap=True)
    else:
        _write("".join(part if isinstance(part, str) else part[0] for part in parts))


def styled(*parts: str | tuple[str, str]) -> Text:
    """Return rich's text of strings and (string, style) pairs. Nothing in them is markup."""
    from rich.text import Text

    return Text.assemble(*parts)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headers. A header that starts with ``>`` aligns its column to the right."""
    headers = [column.removeprefix(">") for column in columns]
    right = [column.startswith(">") for column in columns]
    if is_terminal():
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for number, (header, to_right) in enumerate(zip(headers, right, strict=True)):
            is_last = number == len(headers) - 1  # the one that is cut where the terminal is narrow
            table.add_column(header, justify="right" if to_right else "left", no_wrap=not is_last)
        for row in rows:
            texts = [styled(cell) for cell in row]
            texts[-1].no_wrap, texts[-1].overflow = True, "ellipsis"
            table.add_row(*texts)
        _console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, *rows):
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        _write("  ".join(cells).rstrip())


def print_fields(fields: Mapping[str, str]) -> None:
    """Print names and values, one pair a line."""
    width = max(map(len, fields)) + 2
    for name, value in fields.items():
        print_line((name.ljust(width), "bold"), value)


@cache
def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def size(num_bytes: float) -> str:
    """Return a size for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def duration(seconds: float) -> str:
    """Return a duration for people."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds // 60:,.0f} min {seconds % 60:.0f} s"


def age(unix_s: float) -> str:
    """Return how long ago something was, for people."""
    seconds = max(0.0, time.time() - unix_s)
    for unit, length_s, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * length_s:
            return f"{seconds // length_s:.0f} {unit}"
    return f"{seconds // 86400:,.0f} days"


def span_of_time(seconds: float) -> str:
    """Return a long duration for people."""
    for unit, length_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:,.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def count(number: int, noun: str) -> str:
    """Return ``1 span``, ``2,000 spans``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def probability(value: float) -> str:
    """Return a probability in percent, with three digits."""
    percent = 100 * value
    return f"{percent:.3g} %" if percent >= 0.01 else f"{percent:.0e} %"


def approximate(kv_codec: str) -> str:
    """Return what a person should know of keys and values that are not stored as they were computed."""
    return f"keys and values are approximate ({kv_codec})"
