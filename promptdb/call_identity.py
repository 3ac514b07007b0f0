"""What a call is: a digest of a function, of all that it names, and of its arguments; or a refusal that says why."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.metadata
import importlib.util
import platform
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from blake3 import blake3

from promptdb.code_identity import class_id, code_id
from promptdb.db import PromptDB
from promptdb.engine import Engine
from promptdb.errors import IdentityError
from promptdb.hashing import FieldHasher
from promptdb.hook_context import Hook
from promptdb.identity import weights_id
from promptdb.interventions import Intervention
from promptdb.keys import Root
from promptdb.libraries import (
    check_library,
    imported,
    instructions,
    is_library,
    is_library_file,
    library_version,
    version_of_file,
)
from promptdb.tokenizer_identity import tokenizer_id
from promptdb.version import __version__

__all__ = ["call_key"]

_PLAIN = (type(None), bool, float, str, bytes)
# What a tokenizer does with them is not in its ID: an engine does not ask for it, a function may.
_TOKENIZER_SETTINGS = ("padding_side", "truncation_side", "pad_token", "chat_template", "model_max_length")
_GRAD_MODES = (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.set_grad_enabled)
_HINTS = {
    "PromptDB": "what it holds changes: pass an Engine, or what was read from it",
    "Generator": "pass a seed",
    "Random": "pass a seed",
    "PosixPath": "what a file holds changes: pass what was read from it",
}


def call_key(name: str, version: str, function: Any, arguments: Mapping[str, Any]) -> str:
    """Return 64 hexadecimal digits that differ where a call could give something else.

    Raises
    ------
    IdentityError
        An argument, or something that the function names or closes over, cannot be identified; the message says which.

    Notes
    -----
    Reads all tensors, and all weights of a model that is no engine's.
    """
    call = _Call()
    call.field("name", name).field("version", version).field("python", platform.python_version())
    call.field("promptdb", __version__).field("default dtype", str(torch.get_default_dtype()))
    for library in ("torch", "transformers"):
        call.field(library, importlib.metadata.version(library))
    try:
        call.function(getattr(function, "__qualname__", "the function"), function)
        for argument in arguments:  # in the order of the signature
            call.field("argument", argument)
            call.value(argument, arguments[argument])
    except RecursionError:
        raise IdentityError("an argument holds itself", "pass plain values") from None
    return call.hex()


class _Call:
    def __init__(self) -> None:
        self._hash = FieldHasher("promptdb call")
        self.field = self._hash.field
        self._functions: dict[int, int] = {}

    def hex(self) -> str:
        return self._hash.digest().hex()

    def value(self, where: str, value: Any) -> None:
        """Add any value, its type first, and the number of its items before them: nesting is unambiguous."""
        kind, field = type(value), self.field
        field("type", f"{kind.__module__}.{kind.__qualname__}")
        if kind in _PLAIN:
            field("value", value)
        elif kind in (int, complex):
            field("value", repr(value))
        elif isinstance(value, enum.Enum):
            self._class(where, kind)
            field("value", value.name)
        elif kind in (list, tuple):
            self._items(where, value)
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            self._class(where, kind)
            self._items(where, value)
        elif kind in (dict, OrderedDict, types.MappingProxyType):
            self._items(where, [part for item in value.items() for part in item])
        elif kind in (set, frozenset):
            self._set(where, value)
        elif kind in (slice, range):
            self._items(where, (value.start, value.stop, value.step))
        elif isinstance(value, torch.Tensor):
            self._tensor(where, value)
        elif kind.__module__ == "numpy":
            self._numpy(where, value)
        elif isinstance(value, (torch.dtype, torch.device)):
            field("value", str(value))
        elif isinstance(value, torch.nn.Module):
            self._module(where, value)
        elif isinstance(value, Engine):
            field("root", value.root.digest).field("device", str(value.model.device)).field("strict", value.strict)
        elif isinstance(value, Root):
            field("root", value.digest)
        elif isinstance(value, Hook):
            field("point", value.name).field("layers", repr(value.layers)).field("positions", repr(value.positions))
            self.value(f"{where}: {value!r}", value.fn)
        elif isinstance(value, Intervention):
            field("id", value.id)
            self._items(where, value.hooks)
        elif isinstance(value, _GRAD_MODES):
            field("mode", repr(getattr(value, "mode", None)))
        elif hasattr(value, "backend_tokenizer") or hasattr(value, "encode_batch"):
            field("tokenizer", tokenizer_id(value))
            field("settings", repr([getattr(value, name, None) for name in _TOKENIZER_SETTINGS]))
        elif isinstance(value, type):
            self._class(where, value)
        elif isinstance(value, types.ModuleType):
            self._imported(where, value.__name__)
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial, types.BuiltinFunctionType)):
            self.function(where, value)
        elif dataclasses.is_dataclass(value):
            self._class(where, kind)
            self._items(where, [getattr(value, each.name) for each in dataclasses.fields(value)])
            self._items(where, [part for item in getattr(value, "__dict__", {}).items() for part in item])
        else:
            self._refuse(where, value)

    def _refuse(self, where: str, value: Any) -> NoReturn:
        name = PromptDB.__name__ if isinstance(value, PromptDB) else type(value).__name__
        hint = _HINTS.get(name, "pass numbers, text, tensors, containers of them, functions, models or engines")
        raise IdentityError(f"{where} is a {name}, which cannot be identified", hint)

    def _items(self, where: str, items: Any) -> None:
        self.field("items", len(items))
        for at, item in enumerate(items):
            self.value(f"{where}[{at}]", item)

    def _set(self, where: str, items: Any) -> None:
        digests = []
        for item in items:
            each = _Call()
            each.value(where, item)
            digests.append(each.hex())
        self.field("items", " ".join(sorted(digests)))

    def _tensor(self, where: str, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            raise IdentityError(
                f"{where} is a {type(tensor).__name__} of layout {tensor.layout}", "pass a plain tensor"
            )
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.field("tensor", f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}")
        self.field("content", blake3(memoryview(plain.numpy())).digest())  # type: ignore[arg-type]

    def _numpy(self, where: str, value: Any) -> None:
        dtype: Any = getattr(value, "dtype", None)
        if dtype is None or dtype.hasobject or not hasattr(value, "tobytes"):
            self._refuse(where, value)
        self.field("array", f"{dtype.str} {dtype.descr} {value.shape}").field(
            "content", blake3(value.tobytes()).digest()
        )

    def _module(self, where: str, model: torch.nn.Module) -> None:
        self.field("weights", weights_id(model))
        for cls in dict.fromkeys(type(each) for each in model.modules()):
            self._class(where, cls)
        self.field("training", "".join("01"[each.training] for each in model.modules()))
        self.field("devices", " ".join(sorted({str(each.device) for each in model.parameters()})))

    # Code

    def function(self, where: str, function: Any) -> None:
        """Add a function: its code, defaults, what it closes over and, if it is no library's, what it names."""
        if isinstance(function, functools.partial):
            self.field("partial", len(function.args))
            self._items(where, [*function.args, dict(function.keywords)])
            self.function(where, function.func)
            return
        if isinstance(function, types.MethodType):
            self.value(where, function.__self__)
            self.function(where, function.__func__)
            return
        if isinstance(function, types.BuiltinFunctionType):
            self.field("builtin", function.__qualname__)
            owner = function.__self__
            if owner is None or isinstance(owner, types.ModuleType):
                self._imported(where, function.__module__ or "builtins")
            else:
                self.value(where, owner)
            return
        if not isinstance(function, types.FunctionType):
            self._refuse(where, function)
        if id(function) in self._functions:
            self.field("function", self._functions[id(function)])
            return
        self._functions[id(function)] = len(self._functions)
        code = function.__code__
        is_own = not is_library_file(code.co_filename)
        if is_own and code.co_filename.startswith("<"):  # no file: typed in, or made by dataclasses
            self._code(code)
        elif is_own:
            self.field("code", code_id(where, function)).field("bytecode", code.co_code)
        else:
            version = version_of_file(code.co_filename)
            self.field("library", f"{Path(code.co_filename).name} {code.co_qualname} {version}")
        self._items(f"{where}: a default", [function.__defaults__, function.__kwdefaults__])
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self.field("closure", name)
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self.value(f"{where}: {name}", content)
        if is_own:
            self._named(where, function)

    def _code(self, code: types.CodeType) -> None:
        self.field("bytecode", code.co_code).field("names", repr((code.co_names, code.co_varnames, code.co_flags)))
        self.field("constants", len(code.co_consts))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            elif constant is Ellipsis:
                self.field("constant", "...")
            else:
                self.value("a constant", constant)

    def _named(self, where: str, function: types.FunctionType) -> None:
        names = {
            each.argval
            for each in instructions(function.__code__)
            if each.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
        }
        for name in sorted(names & function.__globals__.keys()):
            self.field("global", name)
            self.value(f"{where}: {name}", function.__globals__[name])
        for name in sorted(imported(where, function.__code__)):
            self._imported(f"{where}: {name}", name)

    def _class(self, where: str, cls: type) -> None:
        if is_library(cls.__module__):
            self.field("class", f"{cls.__module__}.{cls.__qualname__}")
            self._imported(where, cls.__module__)
            return
        if id(cls) in self._functions:
            self.field("class", self._functions[id(cls)])
            return
        self._functions[id(cls)] = len(self._functions)
        self.field("class", class_id(cls))
        for name in sorted(vars(cls)):
            member = vars(cls)[name]
            for function in (getattr(member, "__func__", member), getattr(member, "fget", None)):
                if isinstance(function, types.FunctionType):
                    self.function(f"{where}: {cls.__qualname__}.{name}", function)
            is_plain = not (
                hasattr(member, "__get__") or name.startswith(("__", "_abc_")) or issubclass(cls, enum.Enum)
            )
            if is_plain:  # it may have been set since the class was defined
                self.field("attribute", name)
                self.value(f"{where}: {cls.__qualname__}.{name}", member)
        for base in cls.__bases__:
            self._class(where, base)

    def _imported(self, where: str, name: str) -> None:
        """Add a library by its name and version; refuse a module of the user's own."""
        check_library(where, name)
        self.field("module", name).field("version", library_version(name))
