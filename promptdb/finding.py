"""What an examination found."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
LEVELS = (ERROR, WARNING, NOTE, OK)
"""The worst first."""


@dataclass(frozen=True)
class Finding:
    """What was looked at: how bad it is (``ok``, ``note``, ``warning``, ``error``), what it is, and what to do."""

    level: str
    what: str
    hint: str = ""
