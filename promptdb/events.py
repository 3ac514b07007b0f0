"""What the logger ``promptdb`` says: a sentence for people, and an event with its numbers for programs.

A JSON formatter for :mod:`logging` shows the attributes of a record as fields: ``event``, and those named at each call.
"""

from __future__ import annotations

import logging
from typing import Any

_logger = logging.getLogger("promptdb")

# Messages are shortened to this: an error may quote what it did not understand.
_MOST_CHARACTERS = 1000


def warn(event: str, message: str, **fields: Any) -> None:
    """Say that something went wrong and was dealt with."""
    _logger.warning("%s", message[:_MOST_CHARACTERS], extra={"event": event, **fields})


def note(event: str, message: str, **fields: Any) -> None:
    """Say what nobody needs to know who does not look for it."""
    _logger.debug("%s", message[:_MOST_CHARACTERS], extra={"event": event, **fields})


def unexpected(event: str, message: str, **fields: Any) -> None:
    """Say that something failed that should not, and where: within an ``except``."""
    _logger.error("%s", message[:_MOST_CHARACTERS], exc_info=True, extra={"event": event, **fields})
