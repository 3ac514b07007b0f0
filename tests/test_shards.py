"""Exports of recorded activations: other libraries read back what the store holds, whatever the dtype and the cuts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc

import blake3
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.torch import load_file

from promptdb import PromptDB, shards_parquet
from promptdb.activations import Series
from promptdb.collector import dtype_name, encode_rows
from promptdb.errors import InputTypeError, NotRecordedError, StoreError
from promptdb.keys import Root, pack_tokens
from promptdb.recordings import RecordedRows
from promptdb.shards import FORMATS, export_activations
from promptdb.testing import encode_tokens

ROOT = Root("00" * 32, "11" * 32)
PROMPTS = [list(range(1, 60)), [*range(1, 40), *range(100, 150)], [7, 7, 7]]
DTYPES = ("float32", "float16", "bfloat16", "float64")


def record(db, prompts=PROMPTS, shape=(6,), dtype="float32", point="post-mlp", layer=1):
    """Store random rows of prompts, each position once, of the last span every second one only."""
    generator = torch.Generator().manual_seed(len(prompts) + len(shape))
    for ids in prompts:
        packed = pack_tokens(ids)
        db.put(ROOT, packed, 0, encode_tokens(packed, chunk_tokens=db.chunk_tokens))
        series = Series(point, layer, dtype_name(dtype))
        for step in db.lookup(ids, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps:
            count = step.span_tokens
            offsets = list(range(count)) if step.end < len(ids) or count < 3 else list(range(0, count, 2))
            rows = torch.randn(len(offsets), *shape, generator=generator, dtype=torch.float64)
            value = encode_rows(series, [rows], offsets, step.start)
            db.put_activations([RecordedRows(step.node, series, value)])


def recorded(db, prompts=PROMPTS, point="post-mlp", layer=1):
    """Return (token, position, row) of all that is stored, as the store gives it, in no order."""
    found = set()
    for ids in prompts:
        for position, token in enumerate(ids):
            try:
                row = db.activations(pack_tokens(ids), point, layer, positions=position)
            except NotRecordedError:
                continue
            found.add((token, position, tuple(row.double().flatten().tolist())))
    return found


def read(directory, file_format):
    """Return the same of an export, read by the library of its format."""
    tokens, positions, rows = [], [], []
    for path in sorted(directory.glob("rows-*")):
        if file_format == "parquet":
            table = pq.read_table(path)
            tokens += table["token_id"].to_pylist()
            positions += table["position"].to_pylist()
            rows += table["activation"].to_pylist()
        else:
            tensors = load_file(path)
            tokens += tensors["token_ids"].tolist()
            positions += tensors["positions"].tolist()
            rows += tensors["rows"].double().flatten(1).tolist()
    if file_format == "zarr":
        group = zarr.open_group(directory / "activations.zarr", mode="r")
        tokens, positions = group["token_ids"][:].tolist(), group["positions"][:].tolist()
        rows = group["rows"][:].astype("float64").reshape(len(tokens), -1).tolist()
    found = list(zip(tokens, positions, map(tuple, rows), strict=True))
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file_format", FORMATS)
def test_files_hold_what_the_store_holds(db, tmp_path, file_format, dtype):
    record(db, dtype=dtype)
    source = db.recorded_spans("post-mlp", 1)
    report = export_activations(db, tmp_path / "out", *source, file_format=file_format, shard_bytes=400)
    expected = recorded(db)
    assert read(tmp_path / "out", file_format) == expected
    assert report.num_rows == len(expected) == db.recorded()[0].num_rows
    assert report.num_files > 3
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["format"], manifest["point"], manifest["layer"]) == (file_format, "post-mlp", 1)
    assert (manifest["dtype"], manifest["row_shape"]) == (dtype_name(dtype), [6])
    assert manifest["weights_id"] == ROOT.weights_id
    assert manifest["num_rows"] == report.num_rows
    for file in manifest["files"]:
        content = (tmp_path / "out" / file["name"]).read_bytes()
        assert (len(content), blake3.blake3(content).hexdigest()) == (file["size_bytes"], file["blake3"])
    on_disk = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert on_disk == {file["name"] for file in manifest["files"]} | {"manifest.json"}


@pytest.mark.parametrize("file_format", FORMATS)
def test_rows_of_several_dimensions(db, tmp_path, file_format):
    record(db, shape=(2, 3), point="query-states", layer=0)
    out = tmp_path / "out"
    export_activations(db, out, *db.recorded_spans("query-states", 0), file_format=file_format)
    assert read(out, file_format) == recorded(db, point="query-states", layer=0)
    assert json.loads((out / "manifest.json").read_text())["row_shape"] == [2, 3]
    if file_format == "zarr":
        assert zarr.open_group(out / "activations.zarr")["rows"].shape[1:] == (2, 3)


def test_rows_say_whose_they_are(db, tmp_path):
    record(db)
    source = db.recorded_spans("post-mlp", 1)
    export_activations(db, tmp_path / "p", *source, file_format="parquet")
    export_activations(db, tmp_path / "z", *source, file_format="zarr")
    table = pq.read_table(tmp_path / "p" / "rows-00000.parquet")
    spans = table["span"].to_pylist()
    nodes = dict(db.nodes())
    assert set(spans) == {node.hex() for node in source[2]}
    for span, token, position in zip(spans, *(table[n].to_pylist() for n in ("token_id", "position")), strict=True):
        span_tokens = nodes[bytes.fromhex(span)]
        assert span_tokens.span[4 * (position - span_tokens.start) :][:4] == pack_tokens([token])
    group = zarr.open_group(tmp_path / "z" / "activations.zarr", mode="r")
    assert [bytes(row).hex() for row in group["spans"][:]] == spans
    described = json.loads(table.schema.metadata[b"promptdb"])
    assert described == dict(group.attrs["promptdb"])
    assert described["tokenizer_id"] == ROOT.tokenizer_id
    assert table.schema.field("activation").type.list_size == 6


def test_data_frames_read_it_at_once(db, tmp_path):
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    record(db)
    export_activations(db, tmp_path / "out", *db.recorded_spans("post-mlp", 1), file_format="parquet", shard_bytes=400)
    frame = pandas.read_parquet(tmp_path / "out" / "rows-00000.parquet")
    assert frame["activation"][0].shape == (6,)
    query = f"select position, avg(activation[1]) from '{tmp_path}/out/*.parquet' group by position order by position"
    found = dict(duckdb.sql(query).fetchall())
    by_position = {}
    for _, position, row in recorded(db):
        by_position.setdefault(position, []).append(row[0])
    assert found == pytest.approx({at: sum(values) / len(values) for at, values in by_position.items()}, abs=1e-6)


@pytest.mark.parametrize("file_format", ["parquet", "zarr"])
def test_memory_is_bounded(store_path, tmp_path, monkeypatch, file_format):
    monkeypatch.setattr(shards_parquet, "_GROUP_BYTES", 64 << 10)
    with PromptDB(store_path, chunk_tokens=64) as db:
        record(db, [list(range(1024))], shape=(512,))  # 2 MiB
        source = db.recorded_spans("post-mlp", 1)
        import numpy  # noqa: F401 - not to be counted

        options = {"file_format": file_format, "shard_bytes": (128 << 10) if file_format == "zarr" else None}
        export_activations(db, tmp_path / "first", source[0], source[1], source[2][:1], **options)
        tracemalloc.start()
        export_activations(db, tmp_path / "out", *source, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20
        if file_format == "parquet":
            assert pq.ParquetFile(tmp_path / "out" / "rows-00000.parquet").num_row_groups > 15


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_export_that_did_not_end_has_no_manifest(db, tmp_path, file_format):
    record(db)
    root, series, nodes = db.recorded_spans("post-mlp", 1)
    db.remove_entry(nodes[-1], series)
    with pytest.raises(NotRecordedError, match="not stored any more"):
        export_activations(db, tmp_path / "out", root, series, nodes, file_format=file_format, shard_bytes=100)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(InputTypeError, match="choose one of"):
        export_activations(db, tmp_path / "out", root, series, nodes, file_format="csv")


def test_places_and_dtypes_that_cannot_be_are_refused(db, tmp_path):
    record(db)
    root, series, nodes = db.recorded_spans("post-mlp", 1)
    (tmp_path / "file").write_text("x")
    for file_format in FORMATS:
        with pytest.raises(StoreError, match="cannot be written"):
            export_activations(db, tmp_path / "file", root, series, nodes, file_format=file_format)
    with pytest.raises(StoreError, match="rows of I8 cannot be written as parquet"):
        export_activations(db, tmp_path / "o", root, series._replace(dtype="I8"), nodes, file_format="parquet")


def test_what_is_there_is_not_replaced(db, tmp_path):
    record(db)
    source = db.recorded_spans("post-mlp", 1)
    kept = tmp_path / "out" / "activations.zarr"
    kept.mkdir(parents=True)
    (kept / "mine").write_text("mine")
    with pytest.raises(StoreError, match="is there already"):
        export_activations(db, tmp_path / "out", *source, file_format="zarr")
    assert (kept / "mine").read_text() == "mine"
    export_activations(db, tmp_path / "out", *source, file_format="parquet")
    digest = hashlib.sha256((tmp_path / "out" / "rows-00000.parquet").read_bytes()).digest()
    with pytest.raises(StoreError, match="holds an export already"):
        export_activations(db, tmp_path / "out", *source, file_format="parquet")
    assert hashlib.sha256((tmp_path / "out" / "rows-00000.parquet").read_bytes()).digest() == digest


@pytest.mark.parametrize(("file_format", "library"), [("parquet", "pyarrow"), ("zarr", "zarr")])
def test_a_missing_library_is_named(db, store_path, tmp_path, file_format, library):
    record(db)
    code = f"""
import sys
sys.modules[{library!r}] = None
from promptdb import PromptDB
from promptdb.errors import MissingLibraryError
from promptdb.recordings import RecordedRows
from promptdb.shards import export_activations
with PromptDB({str(store_path)!r}, readonly=True) as db:
    try:
        where = {str(tmp_path / "out")!r}
        export_activations(db, where, *db.recorded_spans("post-mlp", 1), file_format={file_format!r})
    except MissingLibraryError as error:
        assert "promptdb[{file_format}]" in error.hint
    else:
        raise SystemExit("no error")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
