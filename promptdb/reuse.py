"""Results that are computed once: a function whose result is an artifact, found again by all that it was made from."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from promptdb.artifacts import Artifact, check_name
from promptdb.call_identity import call_key
from promptdb.errors import CorruptDataError, InputTypeError
from promptdb.events import warn

if TYPE_CHECKING:
    from promptdb.db import PromptDB

__all__ = ["reused"]

_RESULT = ("tensors", "columns", "config", "plot", "notes")
_KEY_CHARACTERS = 16
_MOST_CHARACTERS = 200


def reused(db: PromptDB, name: str, *, version: str = "1") -> Callable[[Callable[..., Any]], Callable[..., Artifact]]:
    """Make a function compute each result once, and find it in the store from then on.

    Parameters
    ----------
    db : where results are kept, as artifacts named ``name/`` and the start of their key.
    name : of the results.
    version : raise it when something changes that the key does not see: a file that the function reads.

    Returns
    -------
    callable
        A decorator of functions that return what :meth:`Artifacts.save` takes, as a dict: ``tensors``, ``columns``,
        ``config``, ``plot``, ``notes``. The decorated one takes the same arguments and returns an
        :class:`~promptdb.artifacts.Artifact`. ``config`` is the arguments, unless given.

    Raises
    ------
    IdentityError
        When it is called: the function, or an argument, cannot be identified; nothing is computed.
    InputTypeError
        When it is called: the function returned something else.

    Notes
    -----
    What the key sees is in docs/artifacts.md. It is made before and after computing; a result of arguments that were
    changed in between is returned, and not kept, as are all results with a store that is open for reading. Thread safe;
    two that compute the same at once both do.

    Examples
    --------
    >>> from promptdb import PromptDB
    >>> db = PromptDB.in_memory()
    >>> def squares(n): return {"columns": {"square": [i * i for i in range(n)]}}
    """
    check_name(f"{name}/{'0' * _KEY_CHARACTERS}")

    def decorate(function: Callable[..., Any]) -> Callable[..., Artifact]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Artifact:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            key = call_key(name, version, function, bound.arguments)
            kept_as = f"{name}/{key[:_KEY_CHARACTERS]}"
            found = _find(db, kept_as, key)
            if found is not None:
                return found
            result = _checked(function(*args, **kwargs))
            result.setdefault("config", _described(function, bound.arguments))
            made = db.artifacts.make(kept_as, **result, key=key)
            if db.readonly:
                return made
            if call_key(name, version, function, bound.arguments) != key:
                warn("result_not_kept", f"{name}: what it was computed from has changed meanwhile; it is not kept")
                return made
            return db.artifacts.keep(made, replace=True)

        return call

    return decorate


def _find(db: PromptDB, name: str, key: str) -> Artifact | None:
    try:
        record = db.artifacts.find(name)
        return db.artifacts.load(name) if record is not None and record.key == key else None
    except CorruptDataError as error:
        warn("damage", f"{error.message}; computed again", artifact=name)
        return None


def _checked(result: Any) -> dict[str, Any]:
    if not isinstance(result, Mapping) or not set(result) <= set(_RESULT) or not result:
        what = f"a dict with {', '.join(map(repr, result))}" if isinstance(result, Mapping) else type(result).__name__
        raise InputTypeError(f"a result is {what}", f"return a dict with some of {', '.join(_RESULT)}")
    return dict(result)


def _described(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value if _is_short(value) else type(value).__name__ for name, value in arguments.items()}
    return {"function": getattr(function, "__qualname__", "?"), "arguments": shown}


def _is_short(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _MOST_CHARACTERS
    return value is None or isinstance(value, (bool, int, float))
