"""promptdb: a persistent database of prompt representations.

Importing this package imports neither torch nor transformers; its names load when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from promptdb.version import __version__

if TYPE_CHECKING:
    from promptdb.calls import cached
    from promptdb.db import PromptDB
    from promptdb.engine import Engine
    from promptdb.recorder import Recorder
    from promptdb.representation import Representation
    from promptdb.text import Text, run

__all__ = ["Engine", "PromptDB", "Recorder", "Representation", "Text", "__version__", "cached", "run"]

_LAZY = {
    "Engine": "promptdb.engine",
    "PromptDB": "promptdb.db",
    "Recorder": "promptdb.recorder",
    "Representation": "promptdb.representation",
    "Text": "promptdb.text",
    "cached": "promptdb.calls",
    "run": "promptdb.text",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'promptdb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
