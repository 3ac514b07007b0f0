"""Pictures: what is drawn is looked at pixel by pixel or read from SVG; what cannot be drawn is refused."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from promptdb.errors import InputTypeError, StoreError
from promptdb.pictures import draw
from promptdb.plots import Plot


def texts(path):
    """Return all texts of an SVG."""
    found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(each.itertext()).strip() for each in found]


def is_drawn(path):
    pixels = imread(path)
    assert pixels.shape[0] > 200
    return len({tuple(pixel) for pixel in pixels[::3, ::3].reshape(-1, pixels.shape[-1]).tolist()}) > 10


DATA = {
    "epoch": [1, 2, 3],
    "loss": [3.0, 2.0, 1.5],
    "other": [2.0, float("nan"), 1.0],
    "task": ["a$b$", "你", "c"],
    "grid": np.arange(12.0).reshape(3, 4) + 1,
    "curves": np.arange(30.0).reshape(10, 3),
    "flat": 3.0,
}


@pytest.mark.parametrize(
    "plot",
    [
        Plot("line", "loss", "epoch"),
        Plot("line", ("loss", "other"), "epoch", labels=("train", "test"), y_scale="log", x_scale="log"),
        Plot("line", "curves"),
        Plot("scatter", "loss", "epoch"),
        Plot("bar", ("loss", "other"), "task"),
        Plot("heatmap", z="grid"),
        Plot("heatmap", y="task", z="grid", z_scale="log"),
    ],
)
def test_every_kind_is_drawn(tmp_path, plot):
    draw(plot, DATA, tmp_path / "x.png")
    assert is_drawn(tmp_path / "x.png")


@pytest.mark.parametrize(("suffix", "first"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_the_name_says_the_format(tmp_path, suffix, first):
    draw(Plot("line", "loss"), DATA, tmp_path / f"x.{suffix}")
    assert (tmp_path / f"x.{suffix}").read_bytes().startswith(first)


def test_labels_are_written_as_they_are(tmp_path):
    path = tmp_path / "x.svg"
    plot = Plot("bar", ("loss",), "task", title="T $x$ & <b>", x_label="task", y_label="loss (nats)")
    draw(plot, DATA, path)
    found = texts(path)
    assert {"T $x$ & <b>", "task", "loss (nats)", "a$b$", "\\u4f60", "c"} <= set(found)
    draw(Plot("line", ("loss", "other"), "epoch", labels=("train", "test")), DATA, path)
    assert {"train", "test", "epoch"} <= set(texts(path))
    draw(
        Plot("line", "loss", "epoch", y_scale="log", x_label="epoch number"), {"epoch": [1, 2], "loss": [1, 1000]}, path
    )
    assert {"1", "10", "100", "1000", "epoch number", "loss"} <= set(texts(path))


def test_a_heatmap_has_its_rows_from_the_bottom_up(tmp_path):
    path = tmp_path / "x.png"
    draw(Plot("heatmap", z="z"), {"z": [[0.0] * 4] * 4 + [[1.0] * 4] * 4}, path)
    pixels = imread(path)[:, :, :3]
    height, width = pixels.shape[:2]
    top, bottom = pixels[height // 4, width // 3], pixels[3 * height // 5, width // 3]
    assert top[0] > 0.9  # yellow: the largest
    assert bottom[2] > bottom[1]  # violet: the smallest


@pytest.mark.parametrize(
    ("plot", "reason"),
    [
        (Plot("line", "nothing"), "shows 'nothing', which is not there"),
        (Plot("line", "task"), "is not numbers"),
        (Plot("line", "flat"), "one or two dimensions"),
        (Plot("line", "grid", "epoch"), "'grid 0' has 4 numbers, epoch 3"),
        (Plot("bar", "grid", "task"), "3 texts for 4 numbers"),
        (Plot("line", ("loss", "other"), labels=("one",)), "1 labels for 2 lines"),
        (Plot("heatmap", z="loss"), "2 dimensions are drawn"),
        (Plot("heatmap", y="epoch", x="task", z="grid"), "3 names for 4"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path, plot, reason):
    with pytest.raises(InputTypeError, match=reason):
        draw(plot, DATA, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_heatmaps_without_numbers_are_refused(tmp_path):
    for numbers, scale in (([[]], "linear"), ([[float("nan")]], "linear"), ([[-1.0]], "log")):
        with pytest.raises(InputTypeError, match="holds no"):
            draw(Plot("heatmap", z="z", z_scale=scale), {"z": numbers}, tmp_path / "x.png")


def test_places_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(InputTypeError, match="no name of a picture"):
        draw(Plot("line", "loss"), DATA, tmp_path / "x.jpeg")
    with pytest.raises(StoreError, match="cannot be written"):
        draw(Plot("line", "loss"), DATA, tmp_path / "nowhere" / "x.png")


def test_a_missing_library_is_named_and_pyplot_is_left_alone(tmp_path):
    code = f"""
import sys
from promptdb.errors import MissingLibraryError
from promptdb.pictures import draw
from promptdb.plots import Plot
draw(Plot("line", "y"), {{"y": [1, 2]}}, {str(tmp_path / "x.png")!r})
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
sys.modules["matplotlib"] = None
try:
    draw(Plot("line", "y"), {{"y": [1, 2]}}, {str(tmp_path / "x.png")!r})
except MissingLibraryError as error:
    assert "promptdb[plot]" in error.hint
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plot_is_its_fields():
    plot = Plot("line", ("a", "b"), "x", title="t", labels=("p", "q"))
    assert plot.as_fields() == {"kind": "line", "y": ["a", "b"], "x": "x", "title": "t", "labels": ["p", "q"]}
    assert Plot.of(plot.as_fields()) == plot
    assert Plot.of({"kind": "line", "y": "a"}) == Plot("line", "a")
