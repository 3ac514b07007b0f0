"""What a picture shows, as plain data: it is kept with an artifact, and drawn by :mod:`promptdb.pictures`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from promptdb.errors import InputTypeError

__all__ = ["Plot"]

KINDS = ("line", "scatter", "bar", "heatmap")
SCALES = ("linear", "log")


@dataclass(frozen=True)
class Plot:
    """A picture of named data: columns ``[k]`` or tensors.

    Parameters
    ----------
    kind : ``"line"``, ``"scatter"``, ``"bar"`` or ``"heatmap"``.
    y : names of what is drawn upwards, ``[k]`` each; a tensor ``[m, k]`` is m lines. Of a heatmap, the one name of
        what its rows are called, ``[m]``, or nothing: they are numbered from 0.
    x : name of what is drawn to the right, ``[k]``: numbers, or for bars and heatmaps texts too. Nothing: numbered
        from 0.
    z : of a heatmap, the name of its numbers, ``[m, k]``, drawn from the bottom up. NaN is left empty.
    title, x_label, y_label, z_label : what is written at the picture and its axes, with units; names unless given.
    x_scale, y_scale, z_scale : ``"linear"`` or ``"log"``.
    labels : names of the lines in the legend; those of ``y`` unless given.

    Raises
    ------
    InputTypeError
        A field that cannot be.
    """

    kind: str
    y: tuple[str, ...] = ()
    x: str = ""
    z: str = ""
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    z_label: str = ""
    x_scale: str = "linear"
    y_scale: str = "linear"
    z_scale: str = "linear"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("y", "labels"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        texts = [value for value in asdict(self).values() if not isinstance(value, tuple)]
        if any(not isinstance(text, str) for text in (*texts, *self.y, *self.labels)):
            raise InputTypeError(
                "every field of a plot is text, or several texts", "plot={'kind': 'line', 'y': 'loss'}"
            )
        if self.kind not in KINDS:
            raise InputTypeError(f"a plot of kind {self.kind!r}", f"choose one of {', '.join(KINDS)}")
        for scale in (self.x_scale, self.y_scale, self.z_scale):
            if scale not in SCALES:
                raise InputTypeError(f"a scale {scale!r}", f"choose one of {', '.join(SCALES)}")
        if self.kind == "heatmap" and (not self.z or len(self.y) > 1):
            raise InputTypeError("a heatmap without z, or with several y", "z names its numbers [m, k], y its rows [m]")
        if self.kind != "heatmap" and (not self.y or self.z):
            raise InputTypeError(f"a plot of kind {self.kind!r} without y, or with z", "y names what is drawn")

    @classmethod
    def of(cls, found: Plot | Mapping[str, Any]) -> Plot:
        """Return a plot given as its fields; raises :class:`InputTypeError`."""
        if isinstance(found, cls):
            return found
        known = {each.name for each in fields(cls)}
        if not isinstance(found, Mapping) or not set(found) <= known or "kind" not in found:
            raise InputTypeError(f"a plot is {found!r}", f"fields are {', '.join(sorted(known))}; kind is needed")
        try:
            return cls(**found)
        except TypeError as error:
            if isinstance(error, InputTypeError):
                raise
            raise InputTypeError(f"a plot is {found!r}", "y and labels are text, or lists of it") from error

    def as_fields(self) -> dict[str, Any]:
        """Return the fields that say anything, for JSON."""
        plain = Plot.__dataclass_fields__
        found = {name: value for name, value in asdict(self).items() if value != plain[name].default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """What must be at hand to draw it."""
        return tuple(name for name in (self.x, *self.y, self.z) if name)
