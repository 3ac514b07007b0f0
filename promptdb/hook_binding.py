"""Which modules of a model hooks belong to, or why there are none. Attaches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from promptdb.errors import InputTypeError, UnsupportedModelError
from promptdb.hook_context import Hook
from promptdb.hook_places import Architecture, Place, architecture_of, reason_without_module
from promptdb.hook_points import POINTS

if TYPE_CHECKING:
    import torch

Where = tuple[str, int | None]
"""A point and its layer, None for points outside of layers; of a module's path, the number in it."""


class Binding:
    """The points that hooks are on in one model.

    Parameters
    ----------
    model : a Hugging Face decoder with a language-model head; with an adapter of peft, too.
    hooks : in the order in which they are called.

    Attributes
    ----------
    model : the decoder, without the adapter's wrapper.
    hooks : by point and layer, in the order in which points are reached.

    Raises
    ------
    UnsupportedModelError
        A point that the architecture, or a layer, does not have, with the reason.
    InputTypeError
        No such layer or module.
    """

    def __init__(self, model: Any, hooks: Iterable[Hook]) -> None:
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._architecture: Architecture | None = None
        found: dict[Where, list[Hook]] = {}
        for hook in hooks:
            for where in self._wheres(hook):
                found.setdefault(where, []).append(hook)
        order = {name: at for at, name in enumerate(POINTS)}
        self.hooks = dict(sorted(found.items(), key=lambda item: order.get(item[0][0], len(order))))

    def _wheres(self, hook: Hook) -> Iterator[Where]:
        point = POINTS.get(hook.name)
        if point is None:
            self.module(hook.name, None)
            yield hook.name, next((int(part) for part in hook.name.split(".") if part.isdecimal()), None)
            return
        place = self.place(hook.name)
        if not point.by_layer:
            if place.side != "end":
                self.module(hook.name, None)
            yield hook.name, None
            return
        count = len(self.layers())
        for layer in range(count) if hook.layers is None else hook.layers:
            if not -count <= layer < count:
                raise InputTypeError(f"layer {layer} of {hook!r}: the model has {count}", f"0 to {count - 1}")
            self.module(hook.name, layer % count)
            yield hook.name, layer % count

    @property
    def architecture(self) -> Architecture:
        """Where the points are in this model; raises :class:`UnsupportedModelError` if nobody knows."""
        if self._architecture is None:
            self._architecture = architecture_of(self.model.config)
        return self._architecture

    def layers(self) -> Any:
        """Return the model's layers."""
        architecture = self.architecture
        return self.model.get_submodule(architecture.decoder).get_submodule(architecture.layers)

    def place(self, name: str) -> Place:
        """Return where a named point is; raises :class:`UnsupportedModelError` with the reason if it is nowhere."""
        place = self.architecture.places[name]
        if isinstance(place, str):
            raise UnsupportedModelError(
                f"{self.model.config.model_type} models as this one have no {name}: {place}", "hook another point"
            )
        if place.side == "attn" and getattr(self.model.config, "reorder_and_upcast_attn", False):
            raise UnsupportedModelError(
                f"{name}: with reorder_and_upcast_attn the model's eager attention cannot be reached",
                "load it without that option",
            )
        return place

    def module(self, name: str, layer: int | None) -> torch.nn.Module:
        """Return the module that a point, or a path, is at; of a point inside of attention, the layer's attention."""
        if name not in POINTS:
            try:
                return self.model.get_submodule(name)  # type: ignore[no-any-return]
            except AttributeError as error:
                raise InputTypeError(
                    f"{type(self.model).__name__} has no module {name!r}", "model.named_modules() lists them"
                ) from error
        place = self.place(name)
        path = self.architecture.attention if place.side == "attn" else place.path
        start = self.model.get_submodule(self.architecture.decoder) if layer is None else self.layers()[layer]
        try:
            return start.get_submodule(path)  # type: ignore[no-any-return]
        except AttributeError as error:
            where = "outside of the layers" if layer is None else f"in layer {layer}"
            reason = reason_without_module(path)
            raise UnsupportedModelError(f"no {name} {where}: {reason}", "hook other layers or points") from error
