"""Who wrote this: code of known libraries is identified by name, any other code by its source and bytecode."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

from promptdb.errors import IdentityError
from promptdb.hashing import FieldHasher

__all__ = ["LIBRARIES", "class_id", "code_id"]

LIBRARIES = frozenset(
    {"accelerate", "bitsandbytes", "builtins", "peft", "promptdb", "torch", "torchao", "transformers"}
)


def code_id(where: str, function: Any) -> str:
    """Name a function of a known library; add the source of any other, which may change under its name."""
    origin = getattr(function, "__module__", None) or "builtins"
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or type(function).__qualname__
    if origin.split(".")[0] in LIBRARIES:
        return f"{origin}.{name}"
    return f"{name} {_source_id(where, function, origin)}"


def class_id(cls: Any) -> str:
    """Name a class; add the sources of those of its bases that are not of a known library."""
    parts = [cls.__qualname__]
    for base in cls.__mro__:
        top = base.__module__.split(".")[0]
        if top in LIBRARIES or top in sys.stdlib_module_names:  # __main__ is in neither
            parts.append(f"{base.__module__}.{base.__qualname__}")
            break  # the bases of a library's class are the library's
        parts.append(_source_id(base.__qualname__, base, base.__module__))
    return " ".join(parts)


def _source_id(where: str, code: Any, origin: str) -> str:
    """Digest of the file that defines ``code``, as its helpers count too; in a notebook, of its own source.

    Its bytecode as well, as the file may have been edited since it was loaded: such an ID then differs between Python
    versions. Not the module's name: transformers puts a checkpoint's path into the names of modules that come with it.
    """
    import inspect

    try:
        path = Path(inspect.getsourcefile(code) or "")
        text = path.read_bytes() if path.is_file() else inspect.getsource(code).encode()
    except (OSError, TypeError) as error:
        raise IdentityError(f"{where}: no source for {origin}.{code!r}", "define it in a file") from error
    h = FieldHasher("promptdb/source/1").field("text", text)
    members = {"": code} if not isinstance(code, type) else dict(vars(code))
    if origin != "__main__":
        members |= vars(sys.modules.get(origin, types.SimpleNamespace()))
    for name in sorted(members):
        member = getattr(members[name], "__func__", members[name])
        if isinstance(member, types.FunctionType) and (member is code or member.__module__ == origin):
            h.field("name", name)
            _bytecode(h, member.__code__)
            inner = getattr(member, "__wrapped__", None)  # under a decorator
            if isinstance(inner, types.FunctionType):
                _bytecode(h, inner.__code__)
    return h.digest().hex()


def _bytecode(h: FieldHasher, code: types.CodeType) -> None:
    h.field("code", code.co_code).field("names", " ".join(code.co_names))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _bytecode(h, constant)
        elif isinstance(constant, (int, float, complex, str, bytes, tuple, type(None))):
            h.field("constant", repr(constant))  # not of sets, whose order differs by process
