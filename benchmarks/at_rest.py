"""What checksums, compression and encryption cost when representations are put and loaded, and what compression saves.

Keys and values of real computations: of the demo model, which is trained, on text that it was trained on, and of a
random GPT-2 on random tokens; in single and in half precision. They are put into stores of each setting, durably, and
loaded into a cache, in turns, so that a machine that slows down does so for all. ``plain`` checks nothing when it
loads. What is loaded is compared with what was computed, bit for bit.

    python benchmarks/at_rest.py                         # trains the demo model first: minutes
    python benchmarks/at_rest.py --demo DIR --tokens 512 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import median, report

from promptdb.ambient import plain_torch
from promptdb.cache import PromptCache
from promptdb.commits import SpanPayload
from promptdb.db import PromptDB
from promptdb.demo import write_demo_model
from promptdb.demo_models import random_model
from promptdb.demo_text import corpus
from promptdb.keys import Root, pack_tokens
from promptdb.kv import KvSource, encode_span, load_cache
from promptdb.runner import Runner
from promptdb.scores import TokenScores

KEY = os.urandom(32)
CPU = torch.device("cpu")
SPAN_TOKENS = 256


class Setting(NamedTuple):
    """How a store keeps what is put into it, and how it is read."""

    compression: str
    key: bytes
    verify_reads: str


PLAIN = "plain"
SETTINGS = {
    PLAIN: Setting("off", b"", "never"),
    "checksums": Setting("off", b"", "always"),
    "compressed": Setting("zstd", b"", "never"),
    "encrypted": Setting("off", KEY, "never"),
    "all of it": Setting("zstd", KEY, "always"),
}


def computed(model: Any, ids: Sequence[int]) -> PromptCache:
    """Return the keys and values of a prompt."""
    cache = PromptCache(len(ids))
    with plain_torch(CPU):
        Runner(model).extend(torch.tensor(ids), cache, 0, set())
    return cache


def sources(demo: Path, num_tokens: int) -> dict[str, tuple[PromptCache, list[int]]]:
    """Return caches and their prompts, by name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = AutoTokenizer.from_pretrained(demo).encode(corpus()[: 10 * num_tokens])[:num_tokens]
    noise = torch.randint(5, 500, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    gpt2 = random_model(size="gpt2")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        trained = AutoModelForCausalLM.from_pretrained(demo, dtype=dtype).eval()
        name = str(dtype).removeprefix("torch.")
        found[f"demo model, {name}"] = (computed(trained, text), text)
        found[f"random gpt2, {name}"] = (computed(gpt2.to(dtype), noise), noise)
    return found


def payloads(cache: PromptCache, num_tokens: int) -> list[SpanPayload]:
    """Return the spans of a prompt as an engine stores them."""
    source = KvSource(cache)
    spans = []
    for start in range(0, num_tokens, SPAN_TOKENS):
        end = min(start + SPAN_TOKENS, num_tokens)
        blobs = encode_span(source, start, end, TokenScores.unknown(end - start))
        spans.append(SpanPayload(start, end, source.layout, blobs, 0.0, {}))
    return spans


def assert_same(loaded: PromptCache, cache: PromptCache, num_tokens: int) -> None:
    for one, other in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys[:, :, :num_tokens])
        assert torch.equal(one.values, other.values[:, :, :num_tokens])


def measure(
    directory: Path, name: str, cache: PromptCache, ids: list[int], rounds: int, copies: int
) -> list[dict[str, Any]]:
    """Return a row for each setting."""
    spans, packed = payloads(cache, len(ids)), pack_tokens(ids)
    size_bytes = copies * sum(len(span.blobs["kv"]) for span in spans)
    stores = {
        setting: PromptDB(directory / setting.replace(" ", "-"), compression=how.compression, key=how.key)
        for setting, how in SETTINGS.items()
    }
    puts: dict[str, list[float]] = {setting: [] for setting in stores}
    loads: dict[str, list[float]] = {setting: [] for setting in stores}
    for number in range(rounds + 1):
        for setting, db in stores.items():
            roots = [Root("aa" * 32, "bb" * 32, f"{number} {copy}") for copy in range(copies)]
            began = time.perf_counter()
            for root in roots:
                assert db.put(root, packed, 0, lambda _: spans).num_tokens == len(ids)
            puts[setting].append(time.perf_counter() - began)
            db._verified.mode = SETTINGS[setting].verify_reads
            began = time.perf_counter()
            for root in roots:
                match = db.lookup(packed, model="aa" * 32, tokenizer="bb" * 32, namespace=root.namespace)
                with db.read() as snapshot:
                    loaded = load_cache(snapshot, match, len(ids), len(ids), CPU)
                assert loaded is not None
                del snapshot
            loads[setting].append(time.perf_counter() - began)
            assert_same(loaded[0], cache, len(ids))
            del loaded
    charged = {setting: db.usage()["charged_bytes"] for setting, db in stores.items()}
    rows = []
    for setting, db in stores.items():
        assert db.verify() == []
        db.close()
        put_s, load_s = (median(samples[setting][1:]) for samples in (puts, loads))
        plain_put_s, plain_load_s = (median(samples[PLAIN][1:]) for samples in (puts, loads))
        rows.append(
            {
                "keys and values": name,
                "setting": setting,
                "megabytes": round(size_bytes / 1e6, 1),
                "size": round(charged[setting] / charged[PLAIN], 3),
                "put_s_per_gb": round(put_s / size_bytes * 1e9, 3),
                "put_against_plain": round(put_s / plain_put_s, 2),
                "load_s_per_gb": round(load_s / size_bytes * 1e9, 3),
                "load_against_plain": round(load_s / plain_load_s, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="on the disk that a store would be on")
    parser.add_argument("--demo", type=Path, default=None, help="a demo model; by default one is trained")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=100, help="put and loaded in a round, of each setting")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=options.dir or Path.cwd(), prefix=".bench-"))
    rows = []
    try:
        demo = options.demo or write_demo_model(directory / "model").directory
        for name, (cache, ids) in sources(demo, options.tokens).items():
            size_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            copies = max(1, options.megabytes * 10**6 // size_bytes)
            place = Path(tempfile.mkdtemp(dir=directory))
            rows += measure(place, name, cache, ids, options.rounds, copies)
            shutil.rmtree(place)
    finally:
        shutil.rmtree(directory)
    report("at_rest", rows, tokens=options.tokens, rounds=options.rounds)


if __name__ == "__main__":
    main()
