"""Storing and fetching 1,000 tokens of a GPT-2 (124M): each figure against a named alternative in the same run.

Run: ``python benchmarks/core.py [--dir DIR] [--size gpt2] [--rounds N] [--runs N]``. The alternatives take turns with
promptdb, round by round, so that a machine that speeds up or slows down does so for both. Results are checked before
they are timed. DIR should be on the disk that a store would be on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import Row, median, report, token_logprobs
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel

from promptdb import Engine, PromptDB
from promptdb.demo_models import random_model
from promptdb.demo_text import byte_tokenizer
from promptdb.keys import pack_tokens
from promptdb.kv import load_cache
from promptdb.representation import Representation

STORED, NEW = 1000, 8


def take_turns(rounds: int, **works: Callable[[], object]) -> dict[str, float]:
    """Return each work's median seconds over ``rounds`` rounds in which all take turns; the first round is dropped."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            kept = work()
            samples[name].append(time.perf_counter() - began)
            del kept
    return {name: median(seconds[1:]) for name, seconds in samples.items()}


def row(measure: str, seconds: float, alternative: str, other_seconds: float, target: str, *, speed: bool) -> Row:
    """One line: ``ratio`` is how many times faster than the alternative, or which part of its time."""
    ratio = other_seconds / seconds if speed else seconds / other_seconds
    return {
        "measure": measure,
        "promptdb_ms": round(seconds * 1e3, 3),
        "alternative": alternative,
        "alternative_ms": round(other_seconds * 1e3, 3),
        "ratio": round(ratio, 3),
        "ratio_is": "speed against the alternative" if speed else "time against the alternative",
        "target": target,
    }


def assert_same(cache: DynamicCache, expected: DynamicCache) -> None:
    for one, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--size", default="gpt2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=3, help="whole runs; medians of their figures are reported")
    options = parser.parse_args()
    model = random_model(size=options.size)
    runs = []
    for _ in range(options.runs):
        directory = Path(tempfile.mkdtemp(dir=options.dir or Path.cwd(), prefix=".bench-"))
        try:
            runs.append(run(directory, model, options.rounds))
        finally:
            shutil.rmtree(directory)
    report("core", [combine(rows) for rows in zip(*runs, strict=True)], size=options.size, runs=options.runs)


def combine(rows: Sequence[Row]) -> Row:
    """Return the row of medians of several runs, and the ratio of each run."""
    figures = {
        name: round(median([each[name] for each in rows]), 3) for name in ("promptdb_ms", "alternative_ms", "ratio")
    }
    return {**rows[0], **figures, "ratios": " ".join(f"{each['ratio']:.3g}" for each in rows)}


def run(directory: Path, model: PreTrainedModel, rounds: int) -> list[Row]:
    tokenizer = byte_tokenizer()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, (STORED + NEW,), generator=generator)
    stored, longer = ids[:STORED].tolist(), ids.tolist()
    with PromptDB(directory / "store.promptdb") as db, Engine(db, model, tokenizer) as engine:
        engine.get(stored)
        engine.flush()
        rows = [*loading(directory, db, engine, ids, rounds), *hits(engine, ids, stored, rounds)]
        rows += extending(engine, ids, longer, rounds)
        return [*rows, *putting(directory, engine, stored, rounds)]


def loading(directory: Path, db: PromptDB, engine: Engine, ids: torch.Tensor, rounds: int) -> list[Row]:
    with torch.no_grad():
        reference = DynamicCache()
        engine.model(ids[None, :STORED], past_key_values=reference, use_cache=True)
    match = engine.lookup(ids[:STORED])
    cpu = torch.device("cpu")

    def load(mode: str) -> DynamicCache:
        db._verified.mode = mode
        with db.read() as snapshot:
            loaded = load_cache(snapshot, match, STORED, STORED + 64, cpu)
        assert loaded is not None
        return loaded[0]

    assert_same(load("always"), reference)
    tensors = {}
    for number, layer in enumerate(reference.layers):
        tensors[f"{number}.keys"], tensors[f"{number}.values"] = layer.keys.contiguous(), layer.values.contiguous()
    torch.save(tensors, directory / "kv.pt")
    save_file(tensors, directory / "kv.safetensors")
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    source, target = torch.ones(size_bytes // 4), torch.ones(size_bytes // 4)
    plain_source, plain_target = source.numpy(), target.numpy()

    def load_safetensors() -> DynamicCache:
        read = load_file(directory / "kv.safetensors")
        # load_file maps the file; a cache that will be appended to has to be memory of its own.
        layers = [(read[f"{n}.keys"], read[f"{n}.values"]) for n in range(len(reference.layers))]
        return DynamicCache([(keys.clone(), values.clone()) for keys, values in layers])

    def load_torch() -> DynamicCache:
        read = torch.load(directory / "kv.pt")
        return DynamicCache([(read[f"{n}.keys"], read[f"{n}.values"]) for n in range(len(reference.layers))])

    assert_same(load_safetensors(), reference)
    times = take_turns(
        4 * rounds,
        once=lambda: load("once"),
        memcpy=lambda: plain_target.__setitem__(slice(None), plain_source),
        always=lambda: load("always"),
        threads=lambda: target.copy_(source),
        never=lambda: load("never"),
        torch_load=load_torch,
        safetensors=load_safetensors,
    )
    db._verified.mode = "once"
    name = f"load {STORED} stored tokens into a cache"
    return [
        row(name, times["once"], "memcpy of as many bytes (numpy, one thread)", times["memcpy"], ">= 0.8", speed=True),
        row(name, times["once"], "torch copy_ of as many bytes (all threads)", times["threads"], "", speed=True),
        row(name, times["once"], "torch.load into a DynamicCache", times["torch_load"], "> 1", speed=True),
        row(name, times["once"], "safetensors load_file into a DynamicCache", times["safetensors"], "> 1", speed=True),
        row("checksums at every load", times["always"], "no checksums", times["never"], "<= 1.1", speed=False),
        row("checksums at first load (default)", times["once"], "no checksums", times["never"], "<= 1.1", speed=False),
    ]


def hits(engine: Engine, ids: torch.Tensor, stored: list[int], rounds: int) -> list[Row]:
    text_ids = ids[:STORED]

    def recompute() -> torch.Tensor:
        with torch.no_grad():
            logits = engine.model(text_ids[None], use_cache=True).logits[0]
            token_logprobs(logits[:-1], text_ids[1:])
            return logits[-1]

    def hit_with_cache() -> object:
        engine._extender.held = None
        return engine.get(stored).past_key_values()

    representation = engine.get(stored)
    assert representation.tokens_computed == 0
    torch.testing.assert_close(representation.logits, recompute(), rtol=0, atol=1e-3)
    slow = take_turns(max(3, rounds // 3), recompute=recompute)
    fast = take_turns(4 * rounds, hit=lambda: engine.get(stored), cache=hit_with_cache)
    name = f"logits and log-probabilities of {STORED} stored tokens"
    return [
        row(name, fast["hit"], "recomputing", slow["recompute"], "<= 1/300 of the time", speed=True),
        row(name + ", and a cache", fast["cache"], "recomputing", slow["recompute"], "<= 1/60 of the time", speed=True),
    ]


def extending(engine: Engine, ids: torch.Tensor, longer: list[int], rounds: int) -> list[Row]:
    model = engine.model
    base = engine.get(longer[:STORED]).past_key_values()
    mask = torch.ones(1, STORED + NEW, dtype=torch.long)
    size_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in base.layers)
    source, target = torch.ones(size_bytes // 4).numpy(), torch.ones(size_bytes // 4).numpy()
    caches: list[DynamicCache] = []

    def fill() -> None:
        caches.append(DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in base.layers]))

    def in_memory() -> torch.Tensor:
        with torch.no_grad():
            inputs = {"attention_mask": mask, "position_ids": torch.arange(STORED, STORED + NEW)[None]}
            return model(ids[None, STORED:], past_key_values=caches.pop(), use_cache=True, **inputs).logits[0, -1]

    def extend() -> object:
        engine._extender.held = None  # the store is measured, not what the engine remembers of its last prompt
        return engine.get(longer, store=False)

    questions = iter(torch.randint(5, 500, (1000, NEW), generator=torch.Generator().manual_seed(1)).tolist())

    def ask() -> Representation:
        return engine.get(longer[:STORED] + next(questions), store=False)

    def alone() -> torch.Tensor:
        with torch.no_grad():
            return model(ids[None, STORED:], use_cache=True).logits[0, -1]

    fill()
    representation = engine.get(longer, store=False)
    assert representation.tokens_loaded == STORED
    torch.testing.assert_close(representation.logits, in_memory(), rtol=0, atol=1e-3)
    asked = ask()
    assert asked.tokens_loaded == STORED
    with torch.no_grad():
        alone_logits = model(torch.tensor([asked.token_ids])).logits[0, -1]
    torch.testing.assert_close(asked.logits, alone_logits, rtol=0, atol=1e-3)
    times = take_turns(
        3 * rounds,
        promptdb=extend,
        ask=ask,
        fill=fill,
        in_memory=in_memory,
        alone=alone,
        memcpy=lambda: target.__setitem__(slice(None), source),
    )
    limit = times["alone"] + 1.2 * times["memcpy"]
    name = f"logits after {STORED} stored and {NEW} new tokens"
    again = name + ", the next question after the same context"
    return [
        row(name, times["promptdb"], "DynamicCache already in memory", times["in_memory"], "< 1", speed=False),
        row(name, times["promptdb"], f"the {NEW} tokens alone + 1.2 memcpy of the KV", limit, "<= 1", speed=False),
        row(name, times["promptdb"], f"the {NEW} tokens alone", times["alone"], "", speed=False),
        row(again, times["ask"], "DynamicCache already in memory", times["in_memory"], "< 1", speed=False),
        row(again, times["ask"], f"the {NEW} tokens alone + 1.2 memcpy of the KV", limit, "<= 1", speed=False),
    ]


def putting(directory: Path, engine: Engine, stored: list[int], rounds: int) -> list[Row]:
    sizes = {"kv": 0}

    def write_file() -> None:
        with (directory / "plain").open("wb", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())

    # What a put writes: encoded once, committed to a store of its own each time.
    from promptdb.storer import Storer

    captured: list[tuple[object, ...]] = []

    class Capture(Storer):
        def store(self, *arguments: object, **keywords: object) -> None:
            captured.append((arguments, keywords))

    engine._extender.storer, kept = Capture(engine.db, write_behind=False), engine._extender.storer
    changed = [stored[0] + 1, *stored[1:]]
    engine.get(changed)
    engine._extender.storer = kept
    (arguments, keywords) = captured[0]
    with PromptDB(directory / "puts.promptdb", map_bytes=1 << 34) as db:
        storer = Storer(db, write_behind=False)

        def put() -> None:
            storer.store(*arguments, **keywords)

        def clear() -> None:
            for node in [node for node, record in db.nodes() if record.start == 0]:
                db.remove(node)

        put()
        sizes["kv"] = db.stat()["blob_bytes"]
        assert db.verify() == []
        match = db.lookup(pack_tokens(changed), model=engine.root.weights_id, tokenizer=engine.tokenizer_id)
        assert match.is_complete
        content = memoryview(os.urandom(sizes["kv"]))
        times = take_turns(2 * rounds, clear=clear, put=put, file=write_file)
    name, alternative = f"put {STORED} tokens, durable", "one file of as many bytes, fsynced"
    return [row(name, times["put"], alternative, times["file"], ">= 0.8", speed=True)]


if __name__ == "__main__":
    main()
