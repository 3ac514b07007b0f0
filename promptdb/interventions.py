"""Hooks that change a model's passes and whose results may be stored: they have an identity."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from promptdb.code_identity import LIBRARIES, class_id, code_id
from promptdb.errors import IdentityError, InputTypeError, UnsupportedModelError
from promptdb.hashing import FieldHasher
from promptdb.hook_context import Hook, PrecomputeContext
from promptdb.hook_points import POINTS
from promptdb.hook_wiring import Attachment
from promptdb.keys import pack_tokens
from promptdb.libraries import check_library, imported, library_version
from promptdb.probe import steps

if TYPE_CHECKING:
    from promptdb.runner import Runner

__all__ = ["Intervention"]

_HINT = "give what it depends on to Intervention(..., parameters={...}) or make it plain numbers, text or tensors"
_PLAIN = (bool, int, float, str, bytes, type(None))
# A hook is tried where it begins, in a prompt that reaches there.
_MOST_TRIED_TOKENS = 2048


class Intervention:
    """Changing hooks with an ID, for :class:`~promptdb.Engine`: their results are stored under a root of their own.

    Parameters
    ----------
    name : of the intervention, for people; a part of the ID.
    hooks : in the order in which they are called. Each row that a function returns may depend on the same row and on
        those before it only.
    version : raise it when something changes that the ID does not see.
    parameters : what the functions depend on besides: numbers, text, tensors, modules, or containers of them.
    causal : False declares that a row may depend on later ones (a filter over the sequence, a bypassed mask). Each
        prompt is then computed in one pass, and stored for exactly its tokens: under an identity of its own, see
        :meth:`id_for`. Nothing of it is ever found for a shorter, a longer or another prompt.

    Raises
    ------
    InputTypeError
        No hooks, or positions that are counted from a sequence's end: those of a prompt that is extended move.
    IdentityError
        A function that cannot be identified: its results are not stored.

    Notes
    -----
    The ID is a digest of name, version, points, layers, positions and parameters; of the functions' source and
    bytecode; and of all that they close over or name in their module. It is read before and after each computation, so
    that a tensor that is changed in between is noticed (but for edits through ``.data``). What a function reads from
    elsewhere, a file or the clock, it does not see.
    """

    def __init__(
        self,
        name: str,
        hooks: Iterable[Hook],
        *,
        version: str = "1",
        parameters: Mapping[str, Any] | None = None,
        causal: bool = True,
    ) -> None:
        self.name, self.version, self.hooks, self.causal = name, version, tuple(hooks), causal
        self.parameters = dict(parameters or {})
        self._digests: dict[int, tuple[torch.Tensor, tuple[int, int], bytes]] = {}
        self._codes: dict[types.CodeType, str] = {}
        if not isinstance(name, str) or not isinstance(version, str) or not name:
            raise InputTypeError("an intervention's name and version must be text")
        if not isinstance(causal, bool):
            raise InputTypeError(f"causal is {causal!r}", "True, or False for hooks that let tokens see later ones")
        if not self.hooks:
            raise InputTypeError("an intervention without hooks", "give at least one Hook")
        for hook in self.hooks:
            if not isinstance(hook, Hook):
                raise InputTypeError(f"a hook must be a Hook, not {type(hook).__name__}", "Hook(name, fn)")
            if causal:
                _check_positions(hook)
        self.id  # noqa: B018 - refuse now what cannot be identified

    @property
    def id(self) -> str:
        """64 hexadecimal digits, as things are now."""
        hasher = FieldHasher("promptdb intervention 2")  # before, hooks could change keys and values once more
        hasher.field("name", self.name).field("version", self.version)
        if not self.causal:
            hasher.field("causal", 0)
        for hook in self.hooks:
            hasher.field("point", hook.name)
            hasher.field("layers", repr(hook.layers)).field("positions", repr(hook.positions))
            self._add_function(hasher, repr(hook), hook.fn, set())
        self._add(hasher, "parameters", self.parameters, set())
        return hasher.digest().hex()

    def id_for(self, token_ids: Sequence[int]) -> str:
        """Return the intervention ID that a prompt's results are stored under: :attr:`id`, if it is causal."""
        return self.id if self.causal else exact_id(self.id, pack_tokens(token_ids))

    @property
    def untouched_tokens(self) -> int:
        """How many first tokens of any prompt no hook touches: they are what the plain model makes of them."""
        return min(map(_first_position, self.hooks)) if self.causal else 0

    def context(self, config: Any, readers: Iterable[Hook] = ()) -> PrecomputeContext:
        """Return a fresh context with the hooks, and after them such that only read."""
        return PrecomputeContext(config, [*self.hooks, *readers])

    def attach_to(self, runner: Runner) -> None:
        """Let a runner's passes go through the hooks.

        Raises
        ------
        UnsupportedModelError
            The hooks do not fit the model; or a prompt that is computed in steps gives another result than in one pass,
            or a hook begins so far from the start that this is not tried.
        """
        runner.attach = lambda: Attachment(runner.model, self.context(runner.model.config), is_identified=True)
        runner.exact_ways = frozenset()  # in a packed pass, places in the cache are no positions
        runner.is_causal = self.causal
        if not self.causal:
            return
        for hook in self.hooks:
            if max(_begins(hook)) > _MOST_TRIED_TOKENS:
                raise UnsupportedModelError(
                    f"{hook!r}: what begins behind {_MOST_TRIED_TOKENS} tokens is not tried, so nothing can be stored",
                    "Intervention(..., causal=False) stores whole prompts alone",
                )
        places = {place for hook in self.hooks for place in (*_begins(hook), _end(hook))}
        difference, tolerance = steps(runner, {place for place in places if place <= _MOST_TRIED_TOKENS})
        if difference > tolerance:
            raise UnsupportedModelError(
                f"{self.name}: a prompt computed in steps differs from one in one pass by {difference:.1e} of the "
                "largest logit, so nothing of it can be stored",
                "a row may depend on itself and those before it; keys and values of the past must stay as they are. "
                "Intervention(..., causal=False) stores whole prompts alone",
            )

    def _add_function(self, hasher: FieldHasher, where: str, function: Any, seen: set[int]) -> None:
        if isinstance(function, functools.partial):
            self._add(hasher, where, [list(function.args), dict(function.keywords)], seen)
            function = function.func
        if not isinstance(function, types.FunctionType):
            raise IdentityError(f"{where}: a {type(function).__name__} cannot be identified", "use a function")
        if id(function) in seen:
            return
        seen.add(id(function))
        code = function.__code__
        if code not in self._codes:  # reads the file: too slow for every call
            self._codes[code] = code_id(where, function)
        hasher.field("code", self._codes[code]).field("bytecode", code.co_code)
        self._add(hasher, f"{where}: a default", [function.__defaults__, function.__kwdefaults__], seen)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            hasher.field("closure", name)
            self._add(hasher, f"{where}: {name}", cell.cell_contents, seen)
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                hasher.field("global", name)
                self._add(hasher, f"{where}: {name}", function.__globals__[name], seen)
        for name in sorted(imported(where, function.__code__)):
            self._add_module(hasher, f"{where}: {name}", name)

    def _add_module(self, hasher: FieldHasher, where: str, name: str) -> None:
        check_library(where, name)
        hasher.field("module", name)
        # What models are made with may be brought up to date without computing everything again, here as elsewhere.
        if name.split(".")[0] not in LIBRARIES:
            hasher.field("version", library_version(name))

    def _add(self, hasher: FieldHasher, where: str, value: Any, seen: set[int]) -> None:
        hasher.field("type", type(value).__qualname__)
        if isinstance(value, bool) or (not isinstance(value, int) and isinstance(value, _PLAIN)):
            hasher.field("value", value)
        elif isinstance(value, int):
            hasher.field("value", str(value))
        elif isinstance(value, torch.Tensor):
            hasher.field("tensor", self._tensor_digest(value))
        elif isinstance(value, (list, tuple, slice, range)):
            items = (value.start, value.stop, value.step) if isinstance(value, (slice, range)) else tuple(value)
            hasher.field("length", len(items))
            for item in items:
                self._add(hasher, where, item, seen)
        elif isinstance(value, Mapping):
            hasher.field("length", len(value))
            for key in sorted(value, key=repr):
                self._add(hasher, where, key, seen)
                self._add(hasher, where, value[key], seen)
        elif isinstance(value, types.ModuleType):
            self._add_module(hasher, where, value.__name__)
        elif isinstance(value, type):
            hasher.field("class", class_id(value))
        elif isinstance(value, (torch.dtype, torch.device)):
            hasher.field("value", str(value))
        elif isinstance(value, torch.nn.Module):
            hasher.field("class", class_id(type(value))).field("shape", repr(value))
            for name, tensor in [*value.named_parameters(), *value.named_buffers()]:
                hasher.field("name", name).field("tensor", self._tensor_digest(tensor))
        elif isinstance(value, types.BuiltinFunctionType):
            hasher.field("builtin", f"{value.__module__}.{value.__qualname__}")
        elif isinstance(value, (types.FunctionType, functools.partial)):
            self._add_function(hasher, where, value, seen)
        else:
            raise IdentityError(f"{where} is a {type(value).__name__}, which cannot be identified", _HINT)

    def _tensor_digest(self, tensor: torch.Tensor) -> bytes:
        mark = (tensor.data_ptr(), tensor._version)
        held = self._digests.get(id(tensor))
        if held is None or held[1] != mark:
            plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            hasher = blake3(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            hasher.update(plain.numpy().tobytes())
            held = self._digests[id(tensor)] = (tensor, mark, hasher.digest())
        return held[2]


def exact_id(intervention_id: str, packed: bytes) -> str:
    """Return the ID under which results that hold for one sequence of tokens only are stored."""
    return FieldHasher("promptdb exact sequence").field("id", intervention_id).field("tokens", packed).digest().hex()


def _begins(hook: Hook) -> tuple[int, ...]:
    """Return the first and the last position at which a hook begins to touch rows, as far as they are known."""
    at = hook.positions
    if isinstance(at, slice):
        return (at.start or 0,)
    return (min(at), max(at)) if at else (0,)


def _end(hook: Hook) -> int:
    """Return where a slice of positions ends; 0 if it does not, or is none."""
    return (hook.positions.stop or 0) if isinstance(hook.positions, slice) else 0


def _first_position(hook: Hook) -> int:
    """Return the first position that a hook can touch, or 0 where that cannot be told."""
    at = hook.positions
    if hook.name not in POINTS or not at:
        return 0  # what dimension of a module's output is that of tokens, nobody knows
    if isinstance(at, slice):
        is_rising = at.step is None or at.step > 0
        return at.start if is_rising and at.start is not None else 0
    return min(at)


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _check_positions(hook: Hook) -> None:
    at = hook.positions
    numbers = (at.start, at.stop) if isinstance(at, slice) else at or ()
    if any(number is not None and number < 0 for number in numbers):
        raise InputTypeError(
            f"{hook!r}: positions from a sequence's end move when it is extended", "count them from its start"
        )
