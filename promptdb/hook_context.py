"""A hook, and the context that its function is called with. Which module it ends up at is not known here."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from promptdb.errors import InputTypeError
from promptdb.hook_points import POINTS, canonical_name

if TYPE_CHECKING:
    import torch

    HookFunction = Callable[[torch.Tensor, "PrecomputeContext"], torch.Tensor | None]

__all__ = ["Hook", "HookHandles", "PrecomputeContext"]


class Hook:
    """A function that reads or changes one variable of a forward pass.

    Parameters
    ----------
    name : one of :class:`~promptdb.hook_points.HookVariableNames`; a module's path in the model, such as
        ``model.layers.3.mlp``, whose output it then is; or TransformerLens' name, ``blocks.3.hook_resid_post``.
    fn : called as ``fn(x, pctx)`` with the variable and the :class:`PrecomputeContext`. Returns what takes its place,
        of the same shape (its dtype is adapted), or None to leave it as it is. It must not change ``x`` in place.
    layers : in which layers, for points that each layer has: an integer or several, negative ones from the last; all
        by default.
    positions : for which tokens: an integer, a slice, or several integers, counted from the start of the sequence,
        tokens in a cache included; negative ones from its end. ``x`` then holds these rows only, and the function is
        not called in a pass that has none of them. All by default.

    Raises
    ------
    InputTypeError
        A name that cannot be, or layers and positions that are no integers.

    Notes
    -----
    Immutable. Left padding counts as tokens.
    """

    def __init__(
        self,
        name: str,
        fn: HookFunction,
        layers: int | Iterable[int] | None = None,
        positions: int | slice | Iterable[int] | None = None,
    ) -> None:
        self.name, named_layer = canonical_name(name)
        if not callable(fn):
            raise InputTypeError(f"the function of hook {name!r} is a {type(fn).__name__}", "Hook(name, fn)")
        if layers is not None and (
            named_layer is not None or self.name not in POINTS or not POINTS[self.name].by_layer
        ):
            raise InputTypeError(f"{name!r} is in one place, whatever the layer", "leave layers out")
        self.fn = fn
        self.layers = (named_layer,) if named_layer is not None else _integers(layers, "layers")
        self.positions = positions if isinstance(positions, slice) else _integers(positions, "positions")

    def __repr__(self) -> str:
        return f"Hook({self.name!r}, {getattr(self.fn, '__qualname__', type(self.fn).__qualname__)})"

    def rows(self, first: int, count: int, total: int) -> list[int] | None:
        """Return which of ``count`` rows from position ``first`` of ``total`` on it is for; None: all."""
        if self.positions is None:
            return None
        if isinstance(self.positions, slice):
            wanted: Iterable[int] = range(*self.positions.indices(total))
        else:
            wanted = {at if at >= 0 else total + at for at in self.positions}
        return sorted(at - first for at in wanted if first <= at < first + count)


def _integers(values: int | Iterable[int] | None, what: str) -> tuple[int, ...] | None:
    if values is None:
        return None
    try:
        found = values if isinstance(values, Iterable) else (values,)
        return tuple(operator.index(value) for value in found)
    except TypeError as error:
        raise InputTypeError(f"{what} must be integers: {error}") from error


class PrecomputeContext:
    """The hooks of one or more passes, and what their functions keep from one call to the next.

    Parameters
    ----------
    config : the model's configuration.
    hooks : in the order in which they are called; several on one name each get what the one before returned.

    Attributes
    ----------
    context : for the functions to keep things in. ``context["layer"]`` is the number of the layer while a function is
        called for a variable of a layer, and is absent otherwise.
    training_log : the same, by convention for what is to be kept over a training run.
    first_position : while a function is called: the position in the sequence of the first token of the pass's variable.
    past_key_values : during a pass, the cache that the model was given, or None.

    Notes
    -----
    Not thread safe: one for each thread.
    """

    def __init__(self, config: Any, hooks: Iterable[Hook] = ()) -> None:
        self.config = config
        self.context: dict[Any, Any] = {}
        self.training_log: dict[Any, Any] = {}
        self.first_position = 0
        self.past_key_values: Any = None
        self.hooks: list[Hook] = []
        self.add_hooks(hooks)

    def add_hooks(self, hooks: Iterable[Hook]) -> HookHandles:
        """Add hooks after those that are there. Takes effect with the next pass.

        Returns
        -------
        HookHandles
            Removes them again: by ``remove()``, or as a context manager when the block is left.
        """
        added = list(hooks)
        for hook in added:
            if not isinstance(hook, Hook):
                raise InputTypeError(f"a hook must be a Hook, not {type(hook).__name__}", "Hook(name, fn)")
        self.hooks += added
        return HookHandles(self, added)

    def call(self, hooks: Sequence[Hook], x: torch.Tensor, first: int, total: int, dim: int, layer: int | None) -> Any:
        """Call hooks in order, each with what the one before made of a variable, and return what the last one made.

        Parameters
        ----------
        x : the variable; its dimension ``dim`` has tokens for rows, the first of which is at position ``first``.
        total : tokens of the whole sequence so far.
        layer : number of the layer that it belongs to, if it belongs to one.

        Raises
        ------
        InputTypeError
            A function returned no tensor, or one of another shape.
        """
        missing = object()
        before = self.context.get("layer", missing)
        self.first_position = first
        if layer is not None:
            self.context["layer"] = layer
        try:
            for hook in hooks:
                x = self._call_one(hook, x, first, total, dim)
        finally:
            if layer is not None:
                if before is missing:
                    self.context.pop("layer", None)
                else:
                    self.context["layer"] = before
        return x

    def _call_one(self, hook: Hook, x: torch.Tensor, first: int, total: int, dim: int) -> torch.Tensor:
        if hook.positions is None:
            result = hook.fn(x, self)
            if result is None or result is x:
                return x
            return _checked(hook, result, x).to(x.dtype)
        rows = hook.rows(first, x.shape[dim], total)
        if not rows:
            return x
        index = x.new_tensor(rows).long()
        given = x.index_select(dim, index)
        result = hook.fn(given, self)
        if result is None:
            return x
        return x.index_copy(dim, index, _checked(hook, result, given).to(x.dtype))


def _checked(hook: Hook, result: Any, given: torch.Tensor) -> torch.Tensor:
    shape = getattr(result, "shape", None)
    if not isinstance(result, type(given)) and type(result).__name__ != "Tensor":
        raise InputTypeError(
            f"{hook} returned a {type(result).__name__}", "return a tensor, or None to leave the variable as it is"
        )
    if shape != given.shape:
        raise InputTypeError(f"{hook} returned {tuple(result.shape)} for {tuple(given.shape)}")
    return result  # type: ignore[no-any-return]


class HookHandles:
    """Removes hooks from the context that they were added to. A context manager."""

    def __init__(self, pctx: PrecomputeContext, hooks: list[Hook]) -> None:
        self._pctx, self._hooks = pctx, hooks

    def remove(self) -> None:
        """Remove the hooks; those that are gone already are passed over."""
        for hook in self._hooks:
            for at, each in enumerate(self._pctx.hooks):
                if each is hook:
                    del self._pctx.hooks[at]
                    break
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
