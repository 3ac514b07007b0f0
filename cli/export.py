"""Writing the keys and values of a stored prefix to one safetensors file, straight from the store's memory map.

Tensors, by layer N: ``layers.N.keys`` and ``layers.N.values``, ``[kv_heads, tokens, head_dim]`` in the dtype that the
model computed. Beside them ``token_ids`` ``[tokens]``, ``token_logprobs`` ``[tokens - 1]`` in nats (the first token has
none), and ``logits`` ``[vocabulary]`` if those after the last token are stored.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from promptdb.blobs import DTYPE_BYTES, TensorSpec, TensorView, plan_blob
from promptdb.errors import CorruptDataError
from promptdb.format import KV_BLOB, Layout
from promptdb.keys import TOKEN_BYTES
from promptdb.snapshot import Match, Snapshot
from promptdb.trie import Step
from promptdb.version import __version__

from .failure import Failure
from .spans import REPAIR, record_of, stored_logits, stored_logprobs

_FLUSH_BYTES = 8 << 20


@dataclass(frozen=True)
class _Slot:
    """Keys or values of one layer: where they lie in every span."""

    group: int
    index: int
    kv_heads: int
    row_bytes: int  # of one token of one head


def export(snapshot: Snapshot, match: Match, path: Path) -> int:
    """Write the stored prefix of ``match`` to ``path``; return the size of the file in bytes.

    The file appears complete or not at all: it is written under another name, synced and renamed.

    Raises
    ------
    CorruptDataError
        A span is damaged, or was stored without keys and values.
    Failure
        The file cannot be written.
    """
    spans = [(step, _read_span(snapshot, match, step)) for step in match.steps]
    layout = record_of(snapshot, match.steps[0]).layout if match.steps else ()
    slots = {slot: (number, index) for number, group in enumerate(layout) for index, slot in enumerate(group.slots)}
    tensors: list[tuple[TensorSpec, _Slot | memoryview]] = []
    for slot, (number, index) in sorted(slots.items()):
        group = layout[number]
        name = f"layers.{slot // 2}.{'values' if slot % 2 else 'keys'}"
        spec = TensorSpec(name, group.dtype, (group.kv_heads, match.num_tokens, group.head_dim))
        tensors.append((spec, _Slot(number, index, group.kv_heads, group.head_dim * DTYPE_BYTES[group.dtype])))
    tensors += _small_tensors(snapshot, match)
    # Wide elements first, so that every tensor is aligned to its elements, as the safetensors library does it.
    tensors.sort(key=lambda item: -DTYPE_BYTES[item[0].dtype])
    plan = plan_blob([spec for spec, _ in tensors], _metadata(match))

    def chunks() -> Iterator[bytes | memoryview]:
        yield plan.header
        for _, source in tensors:
            yield from _rows(source, spans) if isinstance(source, _Slot) else [source]

    _write(path, chunks())
    return plan.size_bytes


def _read_span(snapshot: Snapshot, match: Match, step: Step) -> list[TensorView]:
    """Return views of a span's keys and values, one per group, checked against the record."""
    record = record_of(snapshot, step)
    tensors = snapshot.blob(step.node, record, KV_BLOB)
    if tensors is None:
        raise CorruptDataError(f"node {step.node[:8].hex()} was stored without keys and values", REPAIR)
    layout: Layout = record_of(snapshot, match.steps[0]).layout
    if record.layout != layout:
        raise CorruptDataError("spans of one prompt are laid out differently", REPAIR)
    views = []
    for number, group in enumerate(layout):
        view = tensors.get(f"kv.{number}")
        if view is None or view.dtype != group.dtype or view.shape != group.span_shape(step.span_tokens):
            raise CorruptDataError(f"node {step.node[:8].hex()}: kv.{number} is not what its record says", REPAIR)
        views.append(view)
    return views


def _rows(slot: _Slot, spans: list[tuple[Step, list[TensorView]]]) -> Iterator[memoryview]:
    """Yield the bytes of ``[kv_heads, tokens, head_dim]``: for each head, the rows of each span that are used."""
    for head in range(slot.kv_heads):
        for step, views in spans:
            begin = (slot.index * slot.kv_heads + head) * step.span_tokens * slot.row_bytes
            yield views[slot.group].data[begin : begin + step.num_tokens * slot.row_bytes]


def _small_tensors(snapshot: Snapshot, match: Match) -> list[tuple[TensorSpec, memoryview]]:
    count = match.num_tokens
    found = [(TensorSpec("token_ids", "U32", (count,)), memoryview(match.packed)[: count * TOKEN_BYTES])]
    logprobs = _little_endian(stored_logprobs(snapshot, match)[1:])
    found.append((TensorSpec("token_logprobs", "F32", (len(logprobs) // 4,)), logprobs))
    logits = stored_logits(snapshot, match)
    if logits is not None:
        found.append((TensorSpec("logits", logits.dtype, logits.shape), logits.data))
    return found


def _little_endian(values: array[float]) -> memoryview:
    if sys.byteorder == "big":
        values.byteswap()
    return memoryview(values.tobytes())


def _metadata(match: Match) -> dict[str, str]:
    root = match.root
    return {
        "format": "pt",
        "promptdb": __version__,
        "num_tokens": str(match.num_tokens),
        "weights_id": root.weights_id,
        "tokenizer_id": root.tokenizer_id,
        "namespace": root.namespace,
        "intervention_id": root.intervention_id,
    }


def _write(path: Path, chunks: Iterator[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb", buffering=_FLUSH_BYTES) as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Failure(f"{path} cannot be written: {error.strerror}", "choose another place for --out") from error
        raise
