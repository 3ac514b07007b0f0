"""``promptdb artifacts``: named results in the store, as people and other programs read them. Loads no torch."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import click

from promptdb.artifact_records import ArtifactRecord
from promptdb.artifacts import Artifact
from promptdb.db import PromptDB
from promptdb.errors import CorruptDataError, NodeNotFoundError
from promptdb.pictures import check_path

from .failure import Failure
from .options import store_options
from .output import age, count, print_fields, print_json, print_line, print_table, size
from .texts import printable

_SHOWN_ROWS = 5
_TEXT_WIDTH = 24


@click.group(short_help="List, show, draw and remove named results.")
def artifacts() -> None:
    """List, show, draw and remove named results.

    `db.artifacts.save(...)` in Python keeps them.

    \b
    Example:
      promptdb artifacts ls
    """


@artifacts.command(short_help="List the results that are kept.")
@store_options
def ls(path: str | None, as_json: bool) -> None:
    """List the results that are kept.

    \b
    Example:
      promptdb artifacts ls
    """
    with PromptDB(path, readonly=True) as db:
        found = db.artifacts.list()
    if as_json:
        print_json({"artifacts": [_described(each) for each in found]})
        return
    if not found:
        print_line("No artifact is kept. `db.artifacts.save(...)` keeps one.")
        return
    rows = [
        (
            printable(each.name),
            f"{len(each.tensors):,}",
            f"{len(each.columns):,}",
            each.plot.kind if each.plot is not None else "-",
            size(each.blob_bytes),
            f"{age(each.created_unix_s)} ago",
        )
        for each in found
    ]
    print_table(("name", ">tensors", ">columns", "plot", ">size", ">saved"), rows)


def _described(each: ArtifactRecord) -> dict[str, Any]:
    return {
        "name": each.name,
        "created_unix_s": each.created_unix_s,
        "created_by": each.created_by,
        "config": each.config,
        "plot": None if each.plot is None else each.plot.as_fields(),
        "notes": each.notes,
        "key": each.key,
        "columns": [name for name, _ in each.columns],
        "tensors": list(each.tensors),
        "size_bytes": each.blob_bytes,
    }


@artifacts.command(short_help="Show all that is known of a result, and the start of its table.")
@click.argument("name")
@store_options
@click.pass_context
def show(ctx: click.Context, name: str, path: str | None, as_json: bool) -> None:
    """Show all that is known of a result, and the start of its table.

    Exit code: 0, or 1 if there is none, or its numbers are damaged. With --json: all of its table.

    \b
    Example:
      promptdb artifacts show probe/layer-5
    """
    damage = ""
    found: Artifact | None = None
    with PromptDB(path, readonly=True) as db:
        record = db.artifacts.find(name)
        if record is None:
            raise NodeNotFoundError(f"there is no artifact {name!r}", "`promptdb artifacts ls` lists them")
        try:
            found = db.artifacts.load(name)
        except CorruptDataError as error:
            damage = error.message
    shapes = {} if found is None else found.shapes()
    columns = {} if found is None else found.columns
    if as_json:
        tensors = {each: {"dtype": dtype, "shape": list(shape)} for each, (dtype, shape) in shapes.items()}
        print_json({**_described(record), "tensors": tensors, "columns": columns, "damage": damage})
    else:
        _print(record, damage, shapes, columns)
    ctx.exit(1 if damage else 0)


def _print(
    record: ArtifactRecord, damage: str, shapes: dict[str, tuple[str, tuple[int, ...]]], columns: dict[str, list[Any]]
) -> None:
    fields = {
        "name": printable(record.name),
        "saved": f"{age(record.created_unix_s)} ago, by {printable(record.created_by)}",
        "key": printable(record.key),
        "config": "" if record.config is None else printable(json.dumps(record.config, ensure_ascii=False)),
        "plot": "" if record.plot is None else printable(json.dumps(record.plot.as_fields(), ensure_ascii=False)),
        "notes": "\n".join(map(printable, record.notes.splitlines())),
        "size": size(record.blob_bytes),
        "damaged": damage,
    }
    print_fields({name: value for name, value in fields.items() if value})
    if shapes:
        rows = [(printable(each), dtype, " × ".join(map(str, shape)) or "-") for each, (dtype, shape) in shapes.items()]
        print_table(("tensor", "dtype", "shape"), rows)
    if columns:
        total = max(map(len, columns.values()))
        lines = [
            tuple(_cell(values[at]) for values in columns.values()) for at in range(min(total, _SHOWN_ROWS))
        ]  # fmt: skip
        if total > _SHOWN_ROWS:
            lines.append((f"… {total - _SHOWN_ROWS:,} more", *[""] * (len(columns) - 1)))
        print_table(tuple(map(printable, columns)), lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = printable(str(value))
    return text if len(text) <= _TEXT_WIDTH else text[: _TEXT_WIDTH - 1] + "…"


@artifacts.command(short_help="Remove results.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@store_options
def rm(names: tuple[str, ...], path: str | None, as_json: bool) -> None:
    """Remove results, whether they hold or not. Nothing else goes.

    Exit code: 0, or 1 if there is none of one of the names.

    \b
    Example:
      promptdb artifacts rm probe/layer-5
    """
    with PromptDB(path) as db:
        for name in names:
            db.artifacts.remove(name)
    if as_json:
        print_json({"removed": list(names)})
    else:
        print_line(f"{count(len(names), 'artifact')} removed.")


@artifacts.command(short_help="Draw a result, as its plot says.")
@click.argument("name")
@click.option("--out", required=True, metavar="FILE", help="Where the picture goes: .png, .svg or .pdf.")
@store_options
def plot(name: str, out: str, path: str | None, as_json: bool) -> None:
    """Draw a result, as its plot says.

    \b
    Example:
      promptdb artifacts plot probe/layer-5 --out loss.png
    """
    check_path(out)
    with PromptDB(path, readonly=True) as db:
        found = db.artifacts.load(name)
    found.draw(out)
    if as_json:
        print_json({"name": name, "out": out})
    else:
        print_line(out)


@artifacts.command(short_help="Write a result to files.")
@click.argument("name")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@store_options
def export(name: str, directory: str, path: str | None, as_json: bool) -> None:
    """Write a result to files in DIR: artifact.json, tensors.safetensors, columns.csv. None of them may be there.

    \b
    Example:
      promptdb artifacts export probe/layer-5 probe
    """
    with PromptDB(path, readonly=True) as db:
        found = db.artifacts.load(name)
    target = Path(directory)
    files: list[str] = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        if found.record.tensors:
            with (target / "tensors.safetensors").open("xb") as raw:
                raw.write(found.tensor_file())
            files.append("tensors.safetensors")
        if found.columns:
            with (target / "columns.csv").open("x", encoding="utf-8", newline="") as stream:
                lines = csv.writer(stream)
                lines.writerow(found.columns)
                lines.writerows(zip(*found.columns.values(), strict=True))
            files.append("columns.csv")
        with (target / "artifact.json").open("x", encoding="utf-8") as stream:
            json.dump(_described(found.record), stream, indent=1, ensure_ascii=False)
            stream.write("\n")
        files.append("artifact.json")
    except FileExistsError as error:
        raise Failure(f"{error.filename} is there already", "choose another directory") from error
    except OSError as error:
        raise Failure(f"{target} cannot be written: {error.strerror}", "check the disk and its permissions") from error
    if as_json:
        print_json({"name": name, "files": files})
    else:
        print_line(f"{directory}: {', '.join(files)}")
