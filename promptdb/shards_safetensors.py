"""Recorded activations as safetensors files, each with whole spans: one copy, from the memory map into the file."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

from promptdb.blobs import TensorSpec, plan_blob
from promptdb.keys import pack_tokens
from promptdb.shard_rows import Source, Written, finished

DEFAULT_SHARD_BYTES = 256 << 20


def write_safetensors(source: Source, target: Path, shard_bytes: int) -> Written:
    """Write ``rows-00000.safetensors`` and so on: ``rows`` ``[m, ...]``, ``token_ids`` and ``positions`` (U32 ``[m]``).

    A file is written from one snapshot; whole spans, and at least one.
    """
    row_shape, files, rows = source.row_shape(), [], 0
    for number, shard in enumerate(_cut(source, shard_bytes)):
        name = f"rows-{number:05}.safetensors"
        part = target / f"{name}.part"
        count = _write(source, part, shard, row_shape)
        part.replace(target / name)
        files.append(finished(target / name, name, count))
        rows += count
    return Written(rows, files)


def _cut(source: Source, shard_bytes: int) -> Iterator[list[bytes]]:
    shard: list[bytes] = []
    size_bytes = 0
    for node in source.nodes:
        with source.db.read() as snapshot:
            entry, _ = source.entry(snapshot, node)
            added = entry.num_rows * (entry.row_bytes + 8)
        if shard and size_bytes + added > shard_bytes:
            yield shard
            shard, size_bytes = [], 0
        shard.append(node)
        size_bytes += added
    if shard:
        yield shard


def _write(source: Source, path: Path, nodes: list[bytes], row_shape: tuple[int, ...]) -> int:
    with source.db.read() as snapshot, path.open("wb") as stream:
        count = sum(source.entry(snapshot, node)[0].num_rows for node in nodes)
        specs = [
            TensorSpec("rows", source.series.dtype, (count, *row_shape)),
            TensorSpec("token_ids", "U32", (count,)),
            TensorSpec("positions", "U32", (count,)),
        ]
        plan = plan_blob(specs, {"point": source.series.point, "weights_id": source.root.weights_id})
        stream.write(plan.header)
        token_ids, positions = array("I"), array("I")
        for span in source.spans(snapshot, nodes, row_shape):
            stream.write(span.data)
            token_ids.extend(span.token_ids)
            positions.extend(span.positions)
        stream.write(pack_tokens(token_ids))
        stream.write(pack_tokens(positions))
    return count
