"""``promptdb activations``: what is recorded, files of it, and pictures. Loads no model and no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import click

from promptdb.db import PromptDB
from promptdb.keys import Root, unpack_tokens
from promptdb.norms import Norms
from promptdb.pictures import check_path, draw
from promptdb.plots import Plot
from promptdb.recall import Recorded
from promptdb.shards import FORMATS, export_activations

from .failure import Failure
from .known import find_weights
from .options import prompt_arguments, store_options
from .output import count, print_json, print_line, print_table, size
from .prompts import read_prompts
from .quantities import size_option
from .record import integers_option
from .texts import Decoders, printable, token_texts

_SHORT_ID = 8


@click.group(short_help="List recorded activations, draw them, or write them to files.")
def activations() -> None:
    """List recorded activations, draw them, or write them to files.

    `promptdb record` computes them.

    \b
    Example:
      promptdb activations ls
    """


@activations.command(short_help="List what is recorded, by model, point and layer.")
@store_options
def ls(path: str | None, as_json: bool) -> None:
    """List what is recorded, by model, point and layer.

    \b
    Example:
      promptdb activations ls
    """
    with PromptDB(path, readonly=True) as db:
        found = db.recorded()
    if as_json:
        print_json({"activations": [_described(each) for each in found]})
        return
    if not found:
        print_line("Nothing is recorded. `promptdb record` records activations.")
        return
    rows = [
        (
            each.root.weights_id[:_SHORT_ID],
            each.root.intervention_id[:_SHORT_ID] or "-",
            each.series.point,
            "-" if each.series.layer is None else str(each.series.layer),
            each.series.dtype,
            " × ".join(map(str, each.row_shape)),
            f"{each.num_rows:,}",
            f"{each.num_spans:,}",
            size(each.size_bytes),
        )
        for each in found
    ]
    print_table(
        ("weights", "intervention", "point", ">layer", "dtype", "row", ">tokens", ">spans", ">size"), rows
    )  # fmt: skip


def _described(each: Recorded) -> dict[str, Any]:
    return {
        "weights_id": each.root.weights_id,
        "tokenizer_id": each.root.tokenizer_id,
        "namespace": each.root.namespace,
        "intervention_id": each.root.intervention_id,
        "point": each.series.point,
        "layer": each.series.layer,
        "dtype": each.series.dtype,
        "row_shape": list(each.row_shape),
        "num_tokens": each.num_rows,
        "num_spans": each.num_spans,
        "size_bytes": each.size_bytes,
    }


@activations.command(short_help="Write the rows of one point to safetensors, Parquet or Zarr files.")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@click.option("--point", required=True, metavar="NAME", help="Which point, as `promptdb activations ls` shows it.")
@click.option("--layer", type=int, metavar="N", help="Which layer, for points that each layer has.")
@click.option("--as", "row_dtype", metavar="F32", help="Which dtype, if rows are stored in several.")
@click.option("--model", metavar="M", help="A checkpoint's directory, its name, or the start of its weights ID.")
@click.option("--namespace", default="", metavar="NAME", help="Of the prompts.")
@click.option("--intervention", default="", metavar="ID", help="Of an intervention, as `ls --json` shows it.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(FORMATS),
    default="safetensors",
    show_default=True,
    help="Of the files.",
)
@click.option(
    "--shard",
    "shard_bytes",
    metavar="SIZE",
    callback=size_option,
    help="How many bytes of rows a file may hold, 256MB unless given; of Zarr, a chunk, 16MB.",
)
@store_options
def export(
    directory: str,
    point: str,
    layer: int | None,
    row_dtype: str | None,
    model: str | None,
    namespace: str,
    intervention: str,
    file_format: str,
    shard_bytes: int | None,
    path: str | None,
    as_json: bool,
) -> None:
    """Write the rows of one point to files in DIR, with a manifest.

    Each row has its token and its position in its prompt. safetensors: `rows`, `token_ids`, `positions`. parquet:
    columns `token_id`, `position`, `span`, `activation`. zarr: a group `activations.zarr` with `rows`, `token_ids`,
    `positions`, `spans`. manifest.json is written last: it names model, point, dtype, shape, and each file with its
    BLAKE3.

    \b
    Examples:
      promptdb activations export --point post-mlp --layer 0 post-mlp-0
      promptdb activations export --point post-mlp --layer 0 --format parquet post-mlp-0
    """
    with PromptDB(path, readonly=True) as db:
        root, series, nodes = db.recorded_spans(
            point, layer, dtype=row_dtype, model=_weights(db, model), namespace=namespace, intervention=intervention
        )
        report = export_activations(
            db, directory, root, series, nodes, file_format=file_format, shard_bytes=shard_bytes
        )
    if as_json:
        print_json({"num_rows": report.num_rows, "num_files": report.num_files, "size_bytes": report.size_bytes})
        return
    print_line(
        f"{directory}: {count(report.num_rows, 'row')} in {count(report.num_files, 'file')}, {size(report.size_bytes)}"
    )


def _weights(db: PromptDB, model: str | None) -> str | None:
    if model is None:
        return None
    found = sorted(find_weights(db, model))
    if len(found) > 1:
        raise Failure(f"{model} may be {count(len(found), 'model')}", "give the start of its weights ID")
    return found[0]


@activations.command(short_help="Draw how long a prompt's activations are, by layer and position.")
@prompt_arguments
@click.option("--point", required=True, metavar="NAME", help="Which point, as `promptdb activations ls` shows it.")
@click.option(
    "--layers", metavar="N,...", callback=integers_option, help="Which layers: 0,5 or 0-11; by default all recorded."
)
@click.option(
    "--show",
    type=click.Choice(("heatmap", "layers", "positions")),
    default="heatmap",
    show_default=True,
    help="The norm of each row; its mean and median by layer; or, by position, a line for each layer.",
)
@click.option("--log", is_flag=True, help="Logarithmic norms: the first token's are often many times the others'.")
@click.option("--out", required=True, metavar="FILE", help="Where the picture goes: .png, .svg or .pdf.")
@click.option("--as", "row_dtype", metavar="F32", help="Which dtype, if rows are stored in several.")
@click.option("--model", metavar="M", help="A checkpoint's directory, its name, or the start of its weights ID.")
@click.option("--namespace", default="", metavar="NAME", help="Of the prompt.")
@click.option("--intervention", default="", metavar="ID", help="Of an intervention, as `ls --json` shows it.")
@store_options
def plot(
    texts: Sequence[str],
    files: Sequence[str],
    point: str,
    layers: list[int] | None,
    show: str,
    log: bool,
    out: str,
    row_dtype: str | None,
    model: str | None,
    namespace: str,
    intervention: str,
    path: str | None,
    as_json: bool,
) -> None:
    """Draw how long a prompt's activations are: the Euclidean norm of each row, by layer and position.

    TEXTs are pieces of one prompt. What is not recorded of it is left empty. With --json, also prints the norms.

    \b
    Examples:
      promptdb activations plot --point post-mlp --out norms.png "Return the number of items"
      promptdb activations plot --point post-mlp --show layers --out layers.svg --file prompt.txt
    """
    check_path(out)
    prompts = read_prompts(texts, files)
    if len(prompts) != 1:
        raise click.UsageError("One prompt is drawn; several were given.")
    with PromptDB(path, readonly=True) as db:
        root = _only_root(db, _weights(db, model), namespace, intervention)
        encoder = Decoders(db).encoder(root)
        if encoder is None:
            raise Failure("the store does not hold this model's tokenizer in a form that runs without transformers")
        packed = encoder.encode(prompts[0].pieces).packed
        norms = db.activation_norms(
            packed, point, layers, dtype=row_dtype, model=root.weights_id, tokenizer=root.tokenizer_id,
            namespace=namespace, intervention=intervention,
        )  # fmt: skip
    ids = unpack_tokens(packed)
    tokens = [printable(text) for text in token_texts(encoder, ids)]
    draw(*_picture(norms, tokens, point, show, log), out)
    if as_json:
        named = [
            {"layer": series.layer, "dtype": series.dtype, "norms": list(values)}
            for series, values in zip(norms.series, norms.values, strict=True)
        ]
        print_json({"out": out, "point": norms.series[0].point, "token_ids": list(ids), "layers": named})
        return
    missing = sum(math.isnan(value) for values in norms.values for value in values)
    left_out = f"; {missing:,} rows are not recorded" if missing else ""
    print_line(f"{out}: {count(len(norms.series), 'layer')}, {count(len(ids), 'token')}{left_out}")


def _only_root(db: PromptDB, weights: str | None, namespace: str, intervention: str) -> Root:
    """Return the one identity that is meant."""
    found = [
        root
        for root, _ in db.roots()
        if (root.namespace, root.intervention_id, root.kv_codec) == (namespace, intervention, "")
        and weights in (None, root.weights_id)
    ]
    if len(found) != 1:
        raise Failure(
            f"the store holds {count(len(found), 'model')} of that kind",
            "choose one with --model" if found else "`promptdb activations ls` lists what is recorded",
            exit_code=2 if found else 1,
        )
    return found[0]


def _picture(norms: Norms, tokens: Sequence[str], point: str, show: str, log: bool) -> tuple[Plot, dict[str, Any]]:
    """Return what is drawn, and its data."""
    scale = "log" if log else "linear"
    layers = ["-" if series.layer is None else str(series.layer) for series in norms.series]
    label = f"Euclidean norm of {point}"
    if show == "heatmap":
        plot = Plot(
            "heatmap", ("layer",), "token", "norm", f"{point}: norm of each token's activation",
            "position and token", "layer", label, z_scale=scale,
        )  # fmt: skip
        names = [f"{at} {text}" if text.strip() else f"{at} {text!r}" for at, text in enumerate(tokens)]
        return plot, {"layer": layers, "token": names, "norm": norms.values}
    if show == "layers":
        plot = Plot(
            "line", ("mean", "median"), "layer", "", f"{point}: norm by layer, over {len(tokens)} tokens",
            "layer", label, y_scale=scale,
        )  # fmt: skip
        rows = [[value for value in values if not math.isnan(value)] for values in norms.values]
        numbers = [math.nan if series.layer is None else float(series.layer) for series in norms.series]
        return plot, {
            "layer": numbers if not any(map(math.isnan, numbers)) else layers,
            "mean": [mean(row) if row else math.nan for row in rows],
            "median": [median(row) if row else math.nan for row in rows],
        }
    plot = Plot(
        "line", ("norm",), "position", "", f"{point}: norm by position", "position", label, y_scale=scale,
        labels=tuple(f"layer {layer}" for layer in layers),
    )  # fmt: skip
    return plot, {"position": list(range(len(tokens))), "norm": norms.values}
