"""Pictures of data, as a :class:`~promptdb.plots.Plot` says. The only user of matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promptdb.errors import InputTypeError, MissingLibraryError, StoreError
from promptdb.plots import Plot

__all__ = ["FORMATS", "draw"]

FORMATS = ("png", "svg", "pdf")

# Okabe and Ito's colours, which most people can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MAX_NAMED_TICKS = 48
_MAX_TICK_CHARACTERS = 16
_MAX_INSIDE = 4
"""Lines whose legend has room beside them; that of more stands outside."""
_LEGEND_ROWS = 20
_STYLE = {
    "text.parse_math": False,  # a dollar sign in a token is one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "font.size": 9,
    "svg.fonttype": "none",
}


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingLibraryError(
            "pictures are drawn by matplotlib, which is not installed", "pip install 'promptdb[plot]'"
        ) from error
    return matplotlib


def check_path(path: str | os.PathLike[str]) -> Path:
    """Return where a picture goes; raises :class:`InputTypeError` unless its name ends as pictures do."""
    target = Path(path)
    if target.suffix.lower().removeprefix(".") not in FORMATS:
        raise InputTypeError(f"{target.name} is no name of a picture", f"let it end in {', '.join(FORMATS)}: x.png")
    return target


def draw(plot: Plot, data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw a picture into a file, which is replaced if it is there.

    Parameters
    ----------
    plot : what is drawn.
    data : by name, what it names: sequences of numbers or texts, or arrays.
    path : ends in ``.png``, ``.svg`` or ``.pdf``.

    Raises
    ------
    InputTypeError
        Data that is missing, or does not fit the plot.
    MissingLibraryError
        matplotlib is not installed.
    StoreError
        The file cannot be written.

    Notes
    -----
    Needs no display, and touches no state of matplotlib's. Some 0.3 s, and a second for importing it.
    """
    target = check_path(path)
    missing = [name for name in plot.names if name not in data]
    if missing:
        raise InputTypeError(f"the plot shows {missing[0]!r}, which is not there", f"there is {', '.join(data)}")
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_size(plot, data), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.set_prop_cycle(color=_COLOURS)
        if plot.kind == "heatmap":
            _heatmap(figure, axes, plot, data)
        else:
            _curves(axes, plot, data)
        axes.set_title(_legible(plot.title))
        try:
            figure.savefig(target)
        except OSError as error:
            raise StoreError(
                f"{target} cannot be written: {error.strerror or error}", "choose another place"
            ) from error


def _size(plot: Plot, data: Mapping[str, Any]) -> tuple[float, float]:
    """Return width and height in inches: a heatmap with named columns is as wide as they need."""
    if plot.kind != "heatmap":
        return 7.0, 4.2
    rows, columns = (_numbers(plot.z, data[plot.z], 2).shape) if plot.z in data else (1, 1)
    wide = min(14.0, max(6.0, 2.2 + 0.19 * columns)) if columns <= _MAX_NAMED_TICKS else 10.0
    return wide, min(8.0, max(2.6, 1.9 + 0.2 * rows))


def _numbers(name: str, value: Any, dimensions: int | None = None) -> Any:
    import numpy

    try:
        found = numpy.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputTypeError(f"{name!r} is not numbers", "choose another column or tensor") from error
    if dimensions is not None and found.ndim != dimensions:
        raise InputTypeError(f"{name!r} has shape {found.shape}, where {dimensions} dimensions are drawn")
    return found


def _texts(value: Any) -> list[str] | None:
    """Return values that are texts, or None if they are numbers."""
    values = list(value)
    return values if values and all(isinstance(each, str) for each in values) else None


def _curves(axes: Any, plot: Plot, data: Mapping[str, Any]) -> None:
    import numpy
    from matplotlib import colormaps

    curves: list[tuple[str, Any]] = []
    for name in plot.y:
        numbers = _numbers(name, data[name])
        if numbers.ndim not in (1, 2):
            raise InputTypeError(f"{name!r} has shape {numbers.shape}; one or two dimensions are drawn")
        curves += [(name, numbers)] if numbers.ndim == 1 else [(f"{name} {at}", row) for at, row in enumerate(numbers)]
    if plot.labels and len(plot.labels) != len(curves):
        raise InputTypeError(f"{len(plot.labels)} labels for {len(curves)} lines")
    count = max(len(numbers) for _, numbers in curves)
    if len(curves) > len(_COLOURS):  # more than can be told apart: their order shows
        axes.set_prop_cycle(color=colormaps["viridis"](numpy.linspace(0, 0.92, len(curves))))
    texts = _texts(data[plot.x]) if plot.x else None
    x = numpy.arange(count, dtype=float) if texts or not plot.x else _numbers(plot.x, data[plot.x], 1)
    if texts is not None and len(texts) != count:
        raise InputTypeError(f"{plot.x!r} has {len(texts)} texts for {count} numbers")
    for at, (name, numbers) in enumerate(curves):
        if numbers.shape != x.shape:
            raise InputTypeError(f"{name!r} has {len(numbers)} numbers, {plot.x or 'the longest'} {len(x)}")
        label = _legible((plot.labels or tuple(name for name, _ in curves))[at])
        if plot.kind == "line":
            axes.plot(x, numbers, label=label, linewidth=1.6, marker="o" if count <= 64 else None, markersize=3.5)
        elif plot.kind == "scatter":
            axes.scatter(x, numbers, label=label, s=14, alpha=0.7, linewidths=0)
        else:
            width = 0.8 / len(curves)
            axes.bar(x + (at - (len(curves) - 1) / 2) * width, numbers, width, label=label)
    if plot.x_scale == "log":
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
    if plot.y_scale == "log":
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
    axes.grid(axis="y" if plot.kind == "bar" else "both", linewidth=0.5, alpha=0.35)
    axes.set_axisbelow(True)
    axes.set_xlabel(_legible(plot.x_label or plot.x))
    axes.set_ylabel(_legible(plot.y_label or (plot.y[0] if len(plot.y) == 1 else "")))
    _ticks(axes.xaxis, texts, x if plot.x_scale == "linear" else None)
    if len(curves) > 1 or plot.labels:
        if len(curves) <= _MAX_INSIDE:
            axes.legend(frameon=False)
        else:
            columns = -(-len(curves) // _LEGEND_ROWS)
            axes.legend(frameon=False, ncols=columns, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _heatmap(figure: Any, axes: Any, plot: Plot, data: Mapping[str, Any]) -> None:
    import numpy
    from matplotlib.colors import LogNorm

    numbers = _numbers(plot.z, data[plot.z], 2)
    if not numbers.size or not numpy.isfinite(numbers).any():
        raise InputTypeError(f"{plot.z!r} holds no numbers to draw")
    shown = numpy.ma.masked_invalid(numbers)
    scale = None
    if plot.z_scale == "log":
        shown = numpy.ma.masked_less_equal(shown, 0)
        if shown.count() == 0:
            raise InputTypeError(f"{plot.z!r} holds no positive numbers", 'leave z_scale "linear"')
        scale = LogNorm(float(shown.min()), float(shown.max()))
    image = axes.imshow(shown, aspect="auto", origin="lower", cmap="viridis", norm=scale, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    if scale is not None:
        _plain_log(bar.ax.yaxis)
    bar.set_label(_legible(plot.z_label or plot.z))
    bar.outline.set_visible(False)
    for axis, name, label, size in (
        (axes.xaxis, plot.x, plot.x_label, numbers.shape[1]),
        (axes.yaxis, plot.y[0] if plot.y else "", plot.y_label, numbers.shape[0]),
    ):
        named = list(data[name]) if name else list(range(size))
        if len(named) != size:
            raise InputTypeError(f"{name!r} has {len(named)} names for {size} rows or columns")
        texts = _texts(named)
        if texts is None and name:
            texts = [f"{float(value):g}" for value in named]
        _ticks(axis, texts, numpy.arange(size))
        axis.set_label_text(_legible(label or name))


def _plain_log(axis: Any) -> None:
    """Write powers of ten as numbers: 0.1, 10, 1000."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))


def _ticks(axis: Any, texts: Sequence[str] | None, places: Any) -> None:
    """Name the places of an axis, as many as can be read; numbers that are whole are not split."""
    if texts is None:
        if places is not None and len(places) and (places == places.round()).all():
            axis.get_major_locator().set_params(integer=True)
        return
    step = -(-len(texts) // _MAX_NAMED_TICKS)
    shown = [
        _legible(text if len(text) <= _MAX_TICK_CHARACTERS else text[: _MAX_TICK_CHARACTERS - 1] + "…")
        for text in texts
    ]
    is_long = axis.axis_name == "x" and (len(shown) > 12 or sum(map(len, shown)) > 60)
    axis.set_ticks(places[::step], shown[::step], rotation=90 if is_long else 0, fontsize=8)


def _legible(text: str) -> str:
    """Return a text with an escape for each character that the font has not."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(
        char if char.isprintable() and font.get_char_index(ord(char)) else char.encode("unicode_escape").decode()
        for char in text
    )
