"""Multiple choice in lm-evaluation-harness: its own model ``hf`` at its best batch size against ``promptdb``.

Run: ``python benchmarks/lm_eval_run.py [--dir DIR] [--size gpt2] [--questions N] [--runs N]``, or with ``--size tiny
--words 10`` to try it. Five examples stand before every question, and four choices of several words follow it. The
examples are the same for all questions (``first_n``, as in MMLU), or drawn for each (lm_eval's default). The
log-probabilities of both models are compared. A store takes some GB; DIR should be on the disk that it would be on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lm_eval
import lm_eval.evaluator
from common import Row, median, report
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from promptdb.demo import write_demo_model
from promptdb.demo_text import corpus
from promptdb.lm_eval import PromptDBLM

SHOTS, CHOICES = 5, 4
SAMPLERS = {"first_n": "the same for all questions", "default": "drawn for each question"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--size", default="gpt2", help="one of promptdb.demo_models.SIZES; random weights")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--words", type=int, default=30, help="of a question; a choice has a quarter")
    parser.add_argument("--runs", type=int, default=3, help="whole runs; medians of their figures are reported")
    parser.add_argument("--examples", choices=list(SAMPLERS), nargs="+", default=list(SAMPLERS))
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="among which hf's best is found"
    )
    options = parser.parse_args()
    # lm_eval lists all installed packages for its report: seconds that say nothing of models.
    lm_eval.evaluator.add_env_info = lambda results: None
    directory = Path(tempfile.mkdtemp(dir=options.dir or Path.cwd(), prefix=".bench-"))
    try:
        checkpoint = str(directory / "model")
        write_demo_model(checkpoint, size=options.size)
        write_tasks(directory, options.questions, options.words)
        rows = []
        for sampler in options.examples:
            rows += measure(directory, checkpoint, sampler, options.runs, options.batch_sizes)
    finally:
        shutil.rmtree(directory)
    sizes = {"shots": SHOTS, "words": options.words, "questions": options.questions, "choices": CHOICES}
    report("lm_eval_run", rows, size=options.size, runs=options.runs, **sizes, lm_eval=version("lm_eval"))


def write_tasks(directory: Path, num_questions: int, num_words: int) -> None:
    """Write questions, made of the text of this machine's Python, and a task for each way to choose examples."""
    words = corpus().split()
    draw = random.Random(0)

    def phrase(length: int) -> str:
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    for split, count in (("train", 50), ("test", num_questions)):
        lines = [
            json.dumps(
                {
                    "question": phrase(num_words),
                    "choices": [phrase(max(1, num_words // 4)) for _ in range(CHOICES)],
                    "answer": draw.randrange(CHOICES),
                }
            )
            for _ in range(count)
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    files = {split: str(directory / f"{split}.jsonl") for split in ("train", "test")}
    for sampler in SAMPLERS:
        task = {
            "task": sampler,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(directory / "cache")},
            "output_type": "multiple_choice",
            "fewshot_split": "train",
            "fewshot_config": {"sampler": sampler},
            "num_fewshot": SHOTS,
            "test_split": "test",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (directory / f"{sampler}.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML


def evaluate(lm: Any, directory: Path, sampler: str, limit: int | None = None) -> tuple[float, dict[str, Any]]:
    """Return the seconds of an evaluation with a model that is loaded, and its results."""
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    began = time.perf_counter()
    results = lm_eval.simple_evaluate(lm, tasks=[sampler], task_manager=manager, bootstrap_iters=0, limit=limit)
    return time.perf_counter() - began, results


def measure(directory: Path, checkpoint: str, sampler: str, runs: int, batch_sizes: list[int]) -> list[Row]:
    hf = HFLM(checkpoint, device="cpu")
    hf.batch_size_per_gpu = best_batch_size(hf, directory, sampler, batch_sizes)
    times: dict[str, list[float]] = {"hf": [], "first": [], "again": []}
    for run in range(runs):
        with counted(hf.model) as forwarded:
            seconds, expected = evaluate(hf, directory, sampler)
        times["hf"].append(seconds)
        distinct = count_distinct(hf, expected["samples"][sampler])
        store = directory / f"{sampler}-{run}.promptdb"
        for name in ("first", "again"):  # each as a process of its own would: nothing is left in memory
            lm = PromptDBLM(checkpoint, db=store, device="cpu")
            seconds, results = evaluate(lm, directory, sampler)
            times[name].append(seconds)
            check(results["samples"][sampler], expected["samples"][sampler])
            if name == "first":
                computed = lm.tokens_computed
            else:
                assert lm.tokens_computed == 0
            del lm
        store_gb = sum(path.stat().st_size for path in store.iterdir()) / 1e9
        shutil.rmtree(store)
    common = {"examples": SAMPLERS[sampler], "hf batch size": hf.batch_size, "hf tokens forwarded": sum(forwarded)}
    seconds_of = {name: median(taken) for name, taken in times.items()}
    return [
        {
            **common,
            "distinct tokens": distinct,
            "ratio of tokens": round(sum(forwarded) / distinct, 2),
            "run": name,
            "tokens computed": tokens,
            "seconds": round(seconds_of[name], 2),
            "hf seconds": round(seconds_of["hf"], 2),
            "ratio of times": round(seconds_of["hf"] / seconds_of[name], 2),
            "ratios": " ".join(f"{hf_s / s:.3g}" for hf_s, s in zip(times["hf"], times[name], strict=True)),
            "store GB": round(store_gb, 2),
        }
        for name, tokens in (("first", computed), ("again", 0))
    ]


def best_batch_size(hf: HFLM, directory: Path, sampler: str, sizes: list[int]) -> int:
    """Return the batch size at which a few questions take the least time."""
    seconds = {}
    for size in sizes:
        hf.batch_size_per_gpu = size
        seconds[size] = evaluate(hf, directory, sampler, limit=8)[0]  # 32 requests: one batch of the largest
    print(f"hf, 8 questions: {', '.join(f'{taken:.2f} s at batch size {size}' for size, taken in seconds.items())}")
    return min(seconds, key=seconds.__getitem__)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Count the tokens, padding included, of every forward pass."""
    counts: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: counts.append(args[0].numel()))
    try:
        yield counts
    finally:
        handle.remove()


def check(samples: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    for mine, other in zip(samples, expected, strict=True):
        assert mine["arguments"] == other["arguments"]
        for (ours, our_flag), (theirs, their_flag) in zip(responses(mine), responses(other), strict=True):
            assert abs(ours - theirs) < 1e-3 + 1e-5 * abs(theirs), (ours, theirs)
            assert our_flag == their_flag


def responses(sample: dict[str, Any]) -> Iterable[tuple[float, bool]]:
    return [response for (response,) in sample["resps"]]


def count_distinct(hf: HFLM, samples: Sequence[dict[str, Any]]) -> int:
    """Count tokens that differ, or stand after something different: what has to be computed at least once."""
    nodes: dict[tuple[int, int], int] = {}  # of a trie: parent and token
    for sample in samples:
        for pair in sample["arguments"]:
            context, continuation = hf._encode_pair(*pair)
            assert len(context + continuation) <= hf.max_length, "what is cut to length shares nothing: use fewer words"
            node = 0
            for token in (context + continuation)[:-1]:  # the last one is only predicted
                node = nodes.setdefault((node, token), len(nodes) + 1)
    return len(nodes)


if __name__ == "__main__":
    main()
