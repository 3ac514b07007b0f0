"""Prompts that share prefixes, as one batch, against running each of them: every figure beside its alternative.

Run: ``python benchmarks/batches.py [--dir D] [--size gpt2] [--runs N] [--rounds N] [--device cuda --dtype bfloat16]``.
The prompts are a grid: 16 choices of 6 tokens, each with 4 endings of 6, after a context of 400 tokens. D should be
on the disk that a store would be on. Results are checked against plain forward passes.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from common import Row, median, report, token_logprobs
from transformers import DynamicCache

from promptdb import Engine, PromptDB
from promptdb.demo_models import random_model
from promptdb.demo_text import byte_tokenizer

CONTEXT, CHOICES, ENDINGS, PIECE = 400, 16, 4, 6


def grid() -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Return the context, the choices and the endings, as token IDs."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 500, (count,), generator=generator).tolist()

    # First tokens that differ, so that nothing but what is meant is shared.
    choices = [[600 + number, *ids(PIECE - 1)] for number in range(CHOICES)]
    endings = [[700 + number, *ids(PIECE - 1)] for number in range(ENDINGS)]
    return ids(CONTEXT), choices, endings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--size", default="gpt2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="in each run, of all but transformers' batches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model = random_model(size=options.size, dtype=options.dtype).to(options.device)
    samples: dict[str, list[float]] = {}
    for _ in range(options.runs):
        directory = Path(tempfile.mkdtemp(dir=options.dir or Path.cwd(), prefix=".bench-"))
        try:
            for name, seconds in run(directory, model, options.rounds).items():
                samples.setdefault(name, []).extend(seconds)
        finally:
            shutil.rmtree(directory)
    name = "batches" if options.device == "cpu" else f"batches-{options.device}"
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else ""
    counts = {"runs": options.runs, "rounds": options.rounds}
    report(name, rows(samples), size=options.size, dtype=options.dtype, **counts, device=device)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that something takes, the device's work included, and its result."""
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


@torch.no_grad()
def run(directory: Path, model: Any, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each thing, in rounds in which all but the slowest take turns."""
    context, choices, endings = grid()
    prompts = [context + choice + ending for choice in choices for ending in endings]
    device = model.device
    found: dict[str, list[float]] = {}
    flat = torch.tensor([[*context, *chain(*choices), *chain(*endings * CHOICES)]], device=device)
    assert flat.shape[1] == CONTEXT + CHOICES * PIECE + CHOICES * ENDINGS * PIECE

    def plain() -> None:
        logits = model(flat, use_cache=True).logits[0]
        token_logprobs(logits[:-1], flat[0, 1:])

    def batches() -> list[torch.Tensor]:
        rows = []
        for first in range(0, len(prompts), 16):
            ids = torch.tensor(prompts[first : first + 16], device=device)
            logits = model(ids).logits
            rows += [(row[-1], token_logprobs(row[:-1], one[1:])) for row, one in zip(logits, ids, strict=True)]
        return rows

    def seed() -> list[torch.Tensor]:
        return extensions(model, context, choices, endings)

    plain()  # warm
    for number in range(rounds):
        seconds = {"plain": timed(plain)[0]}
        store = directory / f"store-{number}"
        with PromptDB(store) as db:
            with Engine(db, model, byte_tokenizer()) as engine:

                def first(engine: Engine = engine) -> list[Any]:
                    results = list(engine.run(prompts))
                    engine.flush()
                    return results

                seconds["first"], results = timed(first)
                assert sum(each.tokens_computed for each in results) == flat.shape[1]
            with Engine(db, model, byte_tokenizer()) as engine:
                seconds["second"], again = timed(lambda engine=engine: list(engine.run(prompts)))
                assert all(each.tokens_computed == 0 for each in again)
        shutil.rmtree(store)
        seconds["seed"], from_seed = timed(seed)
        for name, value in seconds.items():
            found.setdefault(name, []).append(value)
    took, expected = timed(batches)
    found["batches"] = [took] * rounds
    exact = model.dtype == torch.float32
    for ours, second, (logits, logprobs), row in zip(results, again, expected, from_seed, strict=True):
        torch.testing.assert_close(ours.logits.cpu(), second.logits.cpu(), rtol=0, atol=0)
        if exact:
            torch.testing.assert_close(ours.logits, logits, rtol=0, atol=1e-3)
            torch.testing.assert_close(ours.token_logprobs, logprobs, rtol=0, atol=1e-3)
            torch.testing.assert_close(row, logits, rtol=0, atol=1e-3)
    return found


def extensions(
    model: Any, context: list[int], choices: list[list[int]], endings: list[list[int]]
) -> list[torch.Tensor]:
    """The first seed's way: one extension for each text, from a copy of the cache of the text before it."""
    device = model.device
    cache = DynamicCache()
    model(torch.tensor([context], device=device), past_key_values=cache, use_cache=True)
    rows = []
    for choice in choices:
        with_choice = copy.deepcopy(cache)
        model(torch.tensor([choice], device=device), past_key_values=with_choice, use_cache=True)
        for ending in endings:
            whole = copy.deepcopy(with_choice)
            logits = model(torch.tensor([ending], device=device), past_key_values=whole, use_cache=True).logits
            rows.append(logits[0, -1])
    return rows


def rows(samples: dict[str, list[float]]) -> list[Row]:
    middle = {name: median(seconds) for name, seconds in samples.items()}

    def row(measure: str, ours: str, alternative: str, theirs: str, target: str, *, speed: bool) -> Row:
        ratios = [t / o if speed else o / t for o, t in zip(samples[ours], samples[theirs], strict=True)]
        return {
            "measure": measure,
            "promptdb_ms": round(middle[ours] * 1e3, 1),
            "alternative": alternative,
            "alternative_ms": round(middle[theirs] * 1e3, 1),
            "ratio": round(median(ratios), 3),
            "ratio_is": "speed against the alternative" if speed else "time against the alternative",
            "target": target,
            "ratios": " ".join(f"{ratio:.3g}" for ratio in ratios),
        }

    name = f"{CHOICES} x {ENDINGS} after {CONTEXT} tokens, stored durably"
    return [
        row(name, "first", "transformers, batches of 16", "batches", ">= 25", speed=True),
        row(name, "first", "an extension per text from copied caches", "seed", ">= 3 (CPU), >= 10 (GPU)", speed=True),
        row(name, "first", "one forward pass of as many tokens as are distinct", "plain", "<= 1.3", speed=False),
        row("the same, everything stored", "second", "the first run", "first", ">= 50", speed=True),
    ]


if __name__ == "__main__":
    main()
