"""``promptdb activations``: what is recorded, and files of it for other programs. Loads no model and no torch."""

from __future__ import annotations

from typing import Any

import click

from promptdb.db import PromptDB
from promptdb.recall import Recorded
from promptdb.shards import FORMATS, export_activations

from .failure import Failure
from .known import find_weights
from .options import store_options
from .output import count, print_json, print_line, print_table, size
from .quantities import size_option

_SHORT_ID = 8


@click.group(short_help="List recorded activations, or write them to files.")
def activations() -> None:
    """List recorded activations, or write them to files.

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
        weights = None if model is None else sorted(find_weights(db, model))
        if weights is not None and len(weights) > 1:
            raise Failure(f"{model} may be {count(len(weights), 'model')}", "give the start of its weights ID")
        where = None if weights is None else weights[0]
        root, series, nodes = db.recorded_spans(
            point, layer, dtype=row_dtype, model=where, namespace=namespace, intervention=intervention
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
