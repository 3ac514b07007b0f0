"""Write the small store that is kept in ``tests/data`` to prove that old stores stay readable.

    python scripts/make_old_store.py tests/data/store-v2
    python scripts/make_old_store.py tests/data/store-v3 --coded    # compressed, encrypted with KEY, with activations

Run it once per format version and commit what it writes. Never rewrite an old one: it stands for what users have.
"""

from __future__ import annotations

import argparse
import random
import struct
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

from promptdb import PromptDB
from promptdb.activations import Series
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.format import Group
from promptdb.keys import Root, pack_tokens
from promptdb.recordings import RecordedRows
from promptdb.trie import cut

CREATED_UNIX_S = 1_700_000_000.0
ROOT = Root("a1" * 32, "b2" * 32)
TENANT = Root("a1" * 32, "b2" * 32, "tenant", "c3" * 32)
LAYOUT = (Group((0, 1), 2, 4, "F32"), Group((2, 3), 1, 2, "BF16"))
PROMPT = [*range(100, 138), 2**32 - 1, 0]
BRANCH = [*range(100, 110), 7, 7, 7]
CHUNK = 16
TTL_S, QUOTA_BYTES = 3.0e9, 1 << 20  # until 2118
KEY = "0123456789abcdef" * 4
# After how many tokens of PROMPT a store that is compressed has logits that are large enough for that.
MANY_LOGITS_AFTER, NUM_LOGITS = 20, 20_000


def value(slot: int, head: int, position: int, element: int) -> float:
    """Return the number that stands at a place of the stored keys and values; exact in BF16."""
    return float((slot + 1) * (head + 1)) + (position % 8) / 8 - element


def spans(tokens: list[int], start: int, boundaries: list[int]) -> list[SpanPayload]:
    """Return the spans of a prompt from ``start`` on, with made-up keys, values and log-probabilities."""
    found = []
    for begin, end in cut(start, len(tokens), boundaries, CHUNK):
        tensors = []
        for number, group in enumerate(LAYOUT):
            data = b"".join(
                struct.pack("<f", value(slot, head, position, element))[2 if group.dtype == "BF16" else 0 :]
                for slot in group.slots
                for head in range(group.kv_heads)
                for position in range(begin, end)
                for element in range(group.head_dim)
            )
            tensors.append((TensorSpec(f"kv.{number}", group.dtype, group.span_shape(end - begin)), data))
        scores = [float("nan") if position == 0 else -position / 4 for position in range(begin, end)]
        lp = build_blob(
            [(TensorSpec("token_logprobs", "F32", (len(scores),)), struct.pack(f"<{len(scores)}f", *scores))]
        )
        found.append(SpanPayload(begin, end, LAYOUT, {"kv": build_blob(tensors), "lp": lp}, 0.5, {"torch": "2.13.0"}))
    return found


def many_logits() -> bytes:
    """Return numbers that can be compressed, as those of a model can."""
    source = random.Random(3)
    return struct.pack(f"<{NUM_LOGITS}f", *(source.gauss() for _ in range(NUM_LOGITS)))


def recorded(node: bytes, layer: int, offsets: list[int]) -> RecordedRows:
    """Return made-up activations of some tokens of a span: a row of 3 numbers each."""
    numbers = [100 * layer + offset + element / 4 for offset in offsets for element in range(3)]
    tensors = [
        (TensorSpec("rows", "F32", (len(offsets), 3)), struct.pack(f"<{len(numbers)}f", *numbers)),
        (TensorSpec("offsets", "U32", (len(offsets),)), pack_tokens(offsets)),
    ]
    if offsets == list(range(len(offsets))):
        del tensors[1]
    return RecordedRows(node, Series("post-mlp", layer, "F32"), bytearray(16) + build_blob(tensors))


def main(path: Path, *, coded: bool) -> None:
    """Write the store to ``path``: the same bytes every time, unless it is encrypted."""
    if path.exists():
        raise SystemExit(f"{path} exists: an old store is never written again")
    clock = Mock(time=lambda: CREATED_UNIX_S)
    fixed = patch("promptdb.opening.__version__", "0")
    fixed_too = patch("promptdb.registry.time", clock)
    limits: dict[str, Any] = {"quota_bytes": QUOTA_BYTES, "policy": "lru", "clock": clock.time}
    limits |= {"compression": "zstd", "key": KEY} if coded else {"key": ""}
    with fixed, fixed_too, PromptDB(path, chunk_tokens=CHUNK, map_bytes=1, **limits) as db:
        logits = build_blob([(TensorSpec("logits", "F32", (6,)), struct.pack("<6f", *range(6)))])
        packed = pack_tokens(PROMPT)
        after = {len(PROMPT): logits}
        if coded:
            after[MANY_LOGITS_AFTER] = build_blob([(TensorSpec("logits", "F32", (NUM_LOGITS,)), many_logits())])
        db.put(ROOT, packed, 0, lambda start: spans(PROMPT, start, [5]), after)
        db.put(ROOT, pack_tokens(BRANCH), 10, lambda start: spans(BRANCH, start, []))
        db.put(TENANT, pack_tokens(BRANCH), 0, lambda start: spans(BRANCH, start, []), {3: logits}, ttl_s=TTL_S)
        db.set_ttl(TTL_S, namespace=TENANT.namespace)
        db.pin(ROOT, BRANCH, expires_s=TTL_S, name="branch")
        db.tag("é", ROOT, PROMPT)
        db.registry.add_model(ROOT.weights_id, {"name": "tiny", "num_layers": 2, "dtype": "F32"})
        db.registry.update_rates(ROOT.weights_id, compute_tokens_per_s=1000.0)
        db.registry.add_tokenizer(ROOT.tokenizer_id, {"name": "bytes", "json": '{"model": "é"}', "verbatim": True})
        db.registry.add_checkpoint(bytes(range(32)), {"weights_id": ROOT.weights_id})
        if coded:
            node = db.lookup(PROMPT, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps[1].node
            db.put_activations([recorded(node, 0, list(range(11))), recorded(node, 1, [2, 7])])
        assert db.verify() == []
    with PromptDB(path, key=limits["key"], readonly=True) as db:
        version = db.format_version
    (path / "lock.mdb").unlink()
    size_bytes = (path / "data.mdb").stat().st_size
    assert size_bytes < 250_000
    print(f"format {version}: {size_bytes:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--coded", action="store_true")
    options = parser.parse_args()
    main(options.path, coded=options.coded)
