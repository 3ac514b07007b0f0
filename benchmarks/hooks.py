"""Recording POST_MLP of all layers of a GPT-2 (124M), 512 tokens: against a bare forward pass and other ways to record.

Run: ``python benchmarks/hooks.py [--dir DIR] [--size gpt2] [--tokens N] [--rounds N]``. Each takes its turn between two
bare passes. TransformerLens (4) and nnsight take part where they are installed. What is timed is compared with the
model's own ``output_hidden_states`` first.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, median, report
from safetensors.torch import load_file, save_file

from promptdb import Engine, PromptDB
from promptdb.demo_models import random_model
from promptdb.demo_text import byte_tokenizer
from promptdb.hooks import Hook, HookVariableNames, PrecomputeContext, hooked
from promptdb.recorder import Recorder

POINT = HookVariableNames.POST_MLP
SEVERAL = 4


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    kept = work()
    took = time.perf_counter() - began
    del kept  # to free it is not timed
    return took


def take_turns(rounds: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return each work's median seconds over rounds in which all take turns; the first round is dropped."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            samples[name].append(seconds_of(work))
    return {name: median(seconds[1:]) for name, seconds in samples.items()}


Sample = tuple[float, float]


def between(rounds: int, bare: Callable[[], object], works: dict[str, Callable[[], object]]) -> dict[str, list[Sample]]:
    """Return each work's seconds in each round, and those of the bare passes just before and after it, on average.

    The speed of a shared machine changes within seconds: what is compared has to stand side by side. The first round is
    dropped.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        before = seconds_of(bare)
        for name, work in works.items():
            took, after = seconds_of(work), seconds_of(bare)
            samples[name].append((took, (before + after) / 2))
            before = after
    return {name: taken[1:] for name, taken in samples.items()}


def beside(measure: str, samples: list[Sample], target: str, count: int) -> Row:
    ratios = [took / (count * bare) for took, bare in samples]
    return {
        "measure": measure,
        "ms": round(median([took for took, _ in samples]) * 1e3, 3),
        "alternative": "bare forward" if count == 1 else f"{count} bare forwards",
        "alternative_ms": round(count * median([bare for _, bare in samples]) * 1e3, 3),
        "ratio": round(median(ratios), 3),
        "ratio_is": "time against the alternative, median of the rounds",
        "target": target,
        "ratios": " ".join(f"{ratio:.3g}" for ratio in ratios),
    }


def row(measure: str, seconds: float, other: str, other_seconds: float, target: str, *, speed: bool = False) -> Row:
    ratio = other_seconds / seconds if speed else seconds / other_seconds
    return {
        "measure": measure,
        "ms": round(seconds * 1e3, 3),
        "alternative": other,
        "alternative_ms": round(other_seconds * 1e3, 3),
        "ratio": round(ratio, 3),
        "ratio_is": "speed against the alternative" if speed else "time against the alternative",
        "target": target,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--size", default="gpt2")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        with torch.no_grad():
            rows, notes = run(directory, options)
    finally:
        shutil.rmtree(directory)
    report("hooks", rows, tokens=options.tokens, model=options.size, **notes)


def run(directory: Path, options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    model = random_model(size=options.size)
    layers = model.config.num_hidden_layers
    count = options.tokens
    ids = torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(0))
    kept: dict[int, torch.Tensor] = {}
    blocks = model.transformer.h

    def bare() -> object:
        return model(ids)

    def plain_hooks() -> None:
        handles = [
            block.register_forward_hook(lambda m, a, out, n=n: kept.__setitem__(n, out))
            for n, block in enumerate(blocks)
        ]
        model(ids)
        for handle in handles:
            handle.remove()

    def file() -> None:
        plain_hooks()
        path = directory / "rows.safetensors"
        save_file({str(n): each[0].contiguous() for n, each in kept.items()}, path)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())

    wrapped, pctx = hooked(model), PrecomputeContext(model.config)
    pctx.add_hooks([Hook(POINT, lambda x, ctx: kept.__setitem__(ctx.context["layer"], x))])

    def in_memory() -> object:
        return wrapped(ids, pctx=pctx)

    states = model(ids, output_hidden_states=True).hidden_states
    in_memory()
    assert all(
        torch.equal(kept[n], states[n + 1]) for n in range(layers - 1)
    )  # the last one of states is after the norm
    rows = []
    with PromptDB(directory / "store", map_bytes=1 << 33) as db, Engine(db, model, byte_tokenizer()) as engine:
        recorder = Recorder(engine, POINT)
        sequence = [ids[0].tolist()]

        def fresh() -> list[int]:
            sequence[0] = [(each + 1) % 256 for each in sequence[0]]
            return sequence[0]

        def cold() -> object:
            return recorder.run([fresh()])

        def several() -> object:
            return recorder.run([list(fresh()) for _ in range(SEVERAL)])

        def stored() -> None:
            engine.put(fresh())

        def after_hit() -> object:
            return recorder.run([sequence[0]])

        (first,) = recorder.run([sequence[0]])
        assert all(torch.allclose(first.tensor(POINT, n), kept[n][0], atol=1e-4) for n in range(layers))
        works: dict[str, Callable[[], object]] = {
            "plain_hooks": plain_hooks, "file": file, "in_memory": in_memory, "cold": cold,
            "several": several, "stored": stored, "after_hit": after_hit, **others(model, ids, directory),
        }  # fmt: skip
        measures = {
            "plain_hooks": ("plain forward hooks, in memory", ""),
            "in_memory": ("promptdb hooks, in memory", "<= 1.05"),
            "file": ("plain hooks and one safetensors file, fsynced", ""),
            "cold": ("Recorder, cold: KV, logits and rows, durable", "<= 1.15"),
            "several": (f"Recorder, cold, {SEVERAL} prompts in one run: written behind", "<= 1.15"),
            "stored": ("engine.put alone, durable", ""),
            "after_hit": ("Recorder, KV stored: rows, durable", "<= 1.15"),
            "transformer_lens": ("transformer_lens, in memory", ""),
            "nnsight": ("nnsight, in memory", ""),
        }
        samples = between(options.rounds, bare, works)
        for name, (measure, target) in measures.items():
            if name in samples:
                rows.append(beside(measure, samples[name], target, SEVERAL if name == "several" else 1))
        rows += recalling(db, first, layers, options.rounds)
        found = db.recorded()[0]
        raw = found.num_rows * model.config.hidden_size * 4
        rows += streaming(directory, db, recorder, ids, options.rounds)
        notes = {"bytes_per_row_against_raw": round(found.size_bytes / raw, 4)}
        assert db.verify() == []
    return rows, notes


def recalling(db: PromptDB, first: Any, layers: int, rounds: int) -> list[Row]:
    source = torch.cat([first.tensor(POINT, n) for n in range(layers)])
    target = torch.empty_like(source)

    def recall() -> object:
        return first.tensors()

    memory, other = target.numpy(), source.numpy()
    assert torch.equal(torch.cat(list(first.tensors().values())), source)  # and checksums, once
    works: dict[str, Callable[[], object]] = {
        "recall": recall,
        "memcpy": lambda: np.copyto(memory, other),
        "torch": lambda: target.copy_(source),
    }
    times = take_turns(4 * rounds, works)
    return [
        row("recall of all layers", times["recall"], "memcpy, one call", times["memcpy"], ">= 0.8", speed=True),
        row("recall of all layers", times["recall"], "torch copy_, all threads", times["torch"], "", speed=True),
    ]


def streaming(directory: Path, db: PromptDB, recorder: Recorder, ids: torch.Tensor, rounds: int) -> list[Row]:
    """An epoch of shuffled batches of one layer, against shuffled batches from raw safetensors shards."""
    base = ids[0].tolist()
    recorder.run([[n, n + 1, *base] for n in range(8)])
    data = db.activation_dataset(POINT, 0, batch_size=1024, shuffle_buffer=1 << 14)
    shards = []
    for number, shard in enumerate(torch.cat(list(data)).split(4096)):
        save_file({"rows": shard.contiguous()}, directory / f"raw-{number}.safetensors")
        shards.append(directory / f"raw-{number}.safetensors")

    def ours() -> int:
        return sum(batch.shape[0] for batch in data)

    def raw() -> int:
        total = 0
        for path in shards:
            rows = load_file(path)["rows"]
            rows = rows[torch.randperm(rows.shape[0])]
            total += sum(batch.shape[0] for batch in rows.split(1024))
        return total

    assert ours() == raw() == data.num_rows
    times = take_turns(2 * rounds, {"ours": ours, "raw": raw})
    name = f"dataset: {data.num_rows / times['ours']:,.0f} shuffled rows/s"
    return [row(name, times["ours"], "raw safetensors shards", times["raw"], "", speed=True)]


def others(model: Any, ids: torch.Tensor, directory: Path) -> dict[str, Callable[[], object]]:
    """Return the other libraries' ways, of those that are installed and take this model. Each has to give its rows."""
    states = model(ids, output_hidden_states=True).hidden_states
    found: dict[str, Callable[[], object]] = {}
    for name, make in (("nnsight", nnsight_way), ("transformer_lens", lens_way)):
        try:
            way = make(model, ids, directory)
            assert all(torch.allclose(rows, state, atol=1e-4) for rows, state in zip(way(), states[1:-1], strict=False))
            found[name] = way
        except Exception as error:  # noqa: BLE001 - whatever is missing there
            print(f"{name} does not take part: {type(error).__name__}: {error}")
    return found


def nnsight_way(model: Any, ids: torch.Tensor, directory: Path) -> Callable[[], list[torch.Tensor]]:
    wrapped = importlib.import_module("nnsight").NNsight(copy.deepcopy(model))  # it patches what it wraps

    def traced() -> list[torch.Tensor]:
        kept = []
        with wrapped.trace(ids):
            for block in wrapped.transformer.h:
                kept.append(block.output.save())  # noqa: PERF401 - nnsight reads this code, and takes loops only
        return kept

    return traced


def lens_way(model: Any, ids: torch.Tensor, directory: Path) -> Callable[[], list[torch.Tensor]]:
    """A bridge around a copy of the model, as it changes what it is around. Its attention is always eager."""
    bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    model.config.save_pretrained(directory / "config")
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None  # or it is loaded again, by its name
    other = bridge.boot_transformers(
        str(directory / "config"), hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu"
    )
    other.eval()
    layers = model.config.num_hidden_layers

    def cached() -> list[torch.Tensor]:
        _, cache = other.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_resid_post"))
        return [cache[f"blocks.{layer}.hook_resid_post"] for layer in range(layers)]

    return cached


if __name__ == "__main__":
    main()
