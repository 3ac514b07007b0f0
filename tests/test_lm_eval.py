"""The model ``promptdb`` of lm-evaluation-harness gives what its model ``hf`` gives, and computes everything once."""

from __future__ import annotations

import json
import random
import sys
import tomllib
from functools import partialmethod
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from children import Child
from cli_tools import write_checkpoint
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from promptdb import PromptDB
from promptdb.errors import InputTypeError, PromptError
from promptdb.lm_eval import PromptDBLM, main

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "fewshot_split": "train",
        "num_fewshot": 3,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until",
        "fewshot_split": "train",
        "num_fewshot": 2,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
WORDS = ("the", "number", "of", "tokens", "that", "were", "loaded", "and", "a", "prompt", "naïve", "café", "你好", "🙂")


def documents(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length))

    return [
        {
            "question": text(draw.randint(3, 12)) + "?",
            # Of one token and of several; two that begin in the same way; one of them the beginning of another.
            "choices": ["A", "the number", "the number of", text(draw.randint(1, 4))],
            "answer": draw.randrange(4),
            "text": text(draw.choice((2, 20, 150))),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, "gpt2")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return str(directory)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Write tasks and their data, which lm_eval reads from local files."""
    directory = tmp_path_factory.mktemp("tasks")
    for split, count in (("train", 5), ("test", 6)):
        lines = [json.dumps(document) for document in documents(count, seed=count)]
        (directory / f"{split}.jsonl").write_text("\n".join(lines))
    data = {"data_files": {split: str(directory / f"{split}.jsonl") for split in ("train", "test")}}
    for name, fields in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": data | {"cache_dir": str(directory / "cache")}}
        # JSON is YAML.
        (directory / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test"} | source | fields))
    return directory


@pytest.fixture(autouse=True)
def without_list_of_packages(monkeypatch):
    """lm_eval runs ``pip list`` for its report: seconds, and nothing to do with models."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def evaluate(model: str, arguments: dict, tasks: Path, **options) -> dict:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, model_args=arguments, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, device="cpu", **options
    )
    assert results is not None
    return results


def requests(*arguments: tuple) -> list[Instance]:
    return [Instance("loglikelihood", {}, each, index) for index, each in enumerate(arguments)]


def assert_same_samples(ours: dict[str, list[dict]], theirs: dict[str, list[dict]]) -> None:
    for task in TASKS:
        assert len(ours[task]) == len(theirs[task]) == 6
        for mine, other in zip(ours[task], theirs[task], strict=True):
            assert mine["prompt_hash"] == other["prompt_hash"]
            read = str if task == "answers" else json_number
            assert_same(each(read, mine["resps"]), each(read, other["resps"]))


def each(read, value):
    return [each(read, item) for item in value] if isinstance(value, (list, tuple)) else read(value)


def json_number(value: float | bool | str) -> float | bool:
    """Undo what lm_eval's files make of numbers: ``["-1.5", "True"]``."""
    text = str(value)
    return text == "True" if text in ("True", "False") else float(text)


def assert_same(mine, other) -> None:
    """Log-probabilities to 1e-4; flags and texts equal."""
    if isinstance(other, list):
        assert len(mine) == len(other)
        for one, two in zip(mine, other, strict=True):
            assert_same(one, two)
    elif isinstance(other, float):
        assert mine == pytest.approx(other, abs=1e-4, rel=1e-5)
    else:
        assert mine == other


def assert_same_metrics(ours: dict, theirs: dict) -> None:
    for task in TASKS:
        for metric, value in theirs["results"][task].items():
            if "_stderr" not in metric:  # these were not asked for everywhere
                assert_same(ours["results"][task][metric], value)


@pytest.mark.parametrize("chat", [False, True])
def test_evaluates_as_hf_does(checkpoint, tasks, store_path, chat):
    common = {"pretrained": checkpoint, "max_length": 256}
    ours = evaluate("promptdb", common | {"db": str(store_path)}, tasks, apply_chat_template=chat, batch_size="auto")
    theirs = evaluate("hf", common, tasks, apply_chat_template=chat, batch_size=4)
    assert_same_metrics(ours, theirs)
    assert_same_samples(ours["samples"], theirs["samples"])
    assert {"acc,none", "acc_norm,none"} <= set(ours["results"]["choices"])
    assert ours["config"]["promptdb_tokens_computed"] > 0

    again = evaluate("promptdb", common | {"db": str(store_path)}, tasks, apply_chat_template=chat)
    assert again["config"]["promptdb_tokens_computed"] == 0
    assert_same_metrics(again, ours)
    with PromptDB(store_path) as db:
        assert db.verify() == []


# ``python -m promptdb.lm_eval``, but without some 30 seconds in which lm_eval reads its own tasks and lists packages.
COMMAND = """
import functools, runpy
import lm_eval.evaluator
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
lm_eval.evaluator.add_env_info = lambda results: None
runpy.run_module("promptdb.lm_eval", run_name="__main__", alter_sys=True)
"""


def run_command(output: Path, *arguments: object) -> tuple[dict, dict[str, list[dict]]]:
    """Return what lm_eval wrote: its results, and the samples of each task."""
    with Child(COMMAND, *arguments, "--output_path", output) as child:
        child.read()
    (results,) = output.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (path,) = output.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(results.read_text()), samples


def test_from_the_command_line(checkpoint, tasks, store_path, tmp_path):
    common = ["--include_path", tasks, "--tasks", ",".join(TASKS), "--device", "cpu", "--log_samples"]
    stored = f"pretrained={checkpoint},db={store_path}"
    results, samples = run_command(tmp_path / "out", "--model", "promptdb", "--model_args", stored, *common)
    expected = evaluate("hf", {"pretrained": checkpoint}, tasks)
    assert_same_metrics(results, expected)
    assert_same_samples(samples, expected["samples"])
    assert results["config"]["promptdb_tokens_computed"] > 0

    # Another process: this one.
    again = evaluate("promptdb", {"pretrained": checkpoint, "db": str(store_path)}, tasks)
    assert again["config"]["promptdb_tokens_computed"] == 0
    assert_same_metrics(again, expected)


def test_errors_of_the_command_are_one_line(tasks, monkeypatch):
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    arguments = ["--model", "promptdb", "--include_path", tasks, "--tasks", "choices", "--model_args", "size=3"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, arguments)])
    with pytest.raises(
        SystemExit, match=r"^error: the model promptdb has no argument 'size' \(known are pretrained, db"
    ):
        main()


# Single requests


def ours_and_theirs(checkpoint: str, store_path: Path, **options) -> tuple[PromptDBLM, HFLM]:
    # Without its cache of logits, which takes the wrong ones if one text is cut into pairs at two places.
    theirs = HFLM(checkpoint, device="cpu", batch_size=3, logits_cache=False, **options)
    return PromptDBLM(checkpoint, db=store_path, device="cpu", **options), theirs


def most_likely_pairs(lm: HFLM, count: int) -> list[tuple[str, str]]:
    """Return contexts and continuations of which every token is the most likely one."""
    found = []
    for document in documents(100, seed=7):
        context = document["question"]
        tokens = lm.tok_encode(context)
        ids = lm.model.generate(torch.tensor([tokens]), max_new_tokens=3, do_sample=False, pad_token_id=1)[0].tolist()
        continuation = lm.tokenizer.decode(ids[len(tokens) :])
        if lm.tok_encode(context + continuation) == ids:  # not cut in another way, nor half a character
            found.append((context, continuation))
        if len(found) == count:
            return found
    raise AssertionError("no such pairs")


@pytest.mark.parametrize(
    "options", [{}, {"add_bos_token": True}, {"max_length": 24}, {"prefix_token_id": 5, "add_bos_token": False}]
)
def test_single_requests_are_as_with_hf(checkpoint, store_path, options):
    ours, theirs = ours_and_theirs(checkpoint, store_path, **options)
    pairs = [
        ("", "the number"),  # the prefix token is the context
        ("", "<|endoftext|>the number"),  # and is not doubled
        ("<|endoftext|>the", " number"),
        ("the number of ", "tokens"),  # the space belongs to the continuation
        ("the number of", " tokens"),
        ("the number of", " tokens"),  # asked twice
        ("naïve 你", "好 🙂"),
        ("a prompt " * 30, " is stored"),  # too long for 24 tokens
        ("a", " prompt" * 4),
        *most_likely_pairs(theirs, 3),
    ]
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    mine = ours.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert_same([list(pair) for pair in mine], [list(pair) for pair in expected])
    assert {type(flag) for _, flag in mine} == {bool}
    if "max_length" not in options:
        assert [flag for _, flag in mine[-3:]] == [True] * 3
    assert not all(flag for _, flag in mine)

    texts = [("",), ("the",), ("a prompt is stored under its hash " * 10,), ("你好 🙂",)]
    expected = theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert_same(ours.loglikelihood_rolling(requests(*texts), disable_tqdm=True), expected)


def test_fills_the_model_to_its_last_position(checkpoint, store_path):
    """The last token of 1,025 is predicted by a model of 1,024 positions, and need not go through it."""
    ours, theirs = ours_and_theirs(checkpoint, store_path)
    texts = [("a prompt is stored under its hash " * 200,)]
    assert len(ours.tok_encode(*texts[0])) > 2 * ours.max_length
    expected = theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert_same(ours.loglikelihood_rolling(requests(*texts), disable_tqdm=True), expected)
    pairs = [("a prompt " * 1200, continuation) for continuation in ("a", "the number of tokens")]
    assert len(ours._encode_pair(*pairs[0])[1]) == 1
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    mine = ours.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert_same([list(pair) for pair in mine], [list(pair) for pair in expected])
    computed = ours.tokens_computed
    ours.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    ours.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert ours.tokens_computed == computed


def test_generates_as_hf_does(checkpoint, store_path):
    ours, theirs = ours_and_theirs(checkpoint, store_path, max_length=64)
    pairs = [
        ("the number of", {"until": ["e"], "max_gen_toks": 12}),
        ("the number of", {"until": " ", "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
        ("你好 🙂", {"max_gen_toks": 9}),
        ("a prompt " * 60, {"until": [], "max_gen_toks": 30, "repetition_penalty": 1.5}),  # loses its start
        ("the number of", {"max_gen_toks": 8, "num_beams": 3}),
    ]
    generated = ours.generate_until(requests(*pairs), disable_tqdm=True)
    # One at a time: hf pads the start of a batch.
    expected = [theirs.generate_until(requests(pair), disable_tqdm=True)[0] for pair in pairs]
    assert generated == expected
    assert any(generated)
    sampled = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    torch.manual_seed(3)
    expected = theirs.generate_until(requests(("the number", sampled)), disable_tqdm=True)
    torch.manual_seed(3)
    assert ours.generate_until(requests(("the number", sampled)), disable_tqdm=True) == expected


def test_shared_prefixes_are_computed_once(checkpoint, store_path):
    ours, _ = ours_and_theirs(checkpoint, store_path)
    context = "a prompt is stored under its hash " * 20
    pairs = [(f"{context}{question}", f" {choice}") for question in ("one", "two") for choice in ("A", "B", "C", "A")]
    ours.loglikelihood(requests(*pairs), disable_tqdm=True)
    encoded = [[*before, *after] for before, after in (ours._encode_pair(*pair) for pair in pairs)]
    distinct = {tuple(tokens[:end]) for tokens in encoded for end in range(1, len(tokens) + 1)}
    assert ours.tokens_computed == len(distinct)
    assert ours.tokens_loaded + ours.tokens_computed == sum(map(len, encoded))


def test_flags_that_an_old_store_lacks_are_computed(checkpoint, store_path, monkeypatch):
    ours, theirs = ours_and_theirs(checkpoint, store_path)
    pairs = [("the number of", " tokens"), *most_likely_pairs(theirs, 2)]
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    scores = list(ours.engine.score([ours._encode_pair(*pair) for pair in pairs]))
    old = [
        SimpleNamespace(logprob=score.logprob, is_greedy=None, tokens_loaded=score.tokens_loaded, tokens_computed=0)
        for score in scores
    ]
    monkeypatch.setattr(ours.engine, "score", lambda items: iter(old))
    mine = ours.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert_same([list(pair) for pair in mine], [list(pair) for pair in expected])
    assert [flag for _, flag in mine] == [False, True, True]


def test_namespaces_share_nothing(checkpoint, store_path):
    request = requests(("the number of", " tokens"))
    for namespace in ("one", "two"):
        lm = PromptDBLM(checkpoint, db=store_path, device="cpu", namespace=namespace)
        lm.loglikelihood(request, disable_tqdm=True)
        assert lm.tokens_computed > 0
        assert lm.tokens_loaded == 0


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretained": "x"}, "no argument 'pretained' .known are pretrained, db, dtype, device, namespace"),
        ({}, "no checkpoint is named"),
        ({"namespace": 1}, 'namespace is 1, of type int, not str .*namespace="1"'),
        ({"max_length": 2.5}, "max_length is 2.5, of type float"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_wrong_arguments(checkpoint, store_path, arguments, message):
    given = {"pretrained": checkpoint} | arguments if arguments else {}
    with pytest.raises(InputTypeError, match=message):
        PromptDBLM.create_from_arg_obj({"db": str(store_path)} | given, {"batch_size": 8, "device": "cpu"})
    assert not store_path.exists()


def test_requests_that_cannot_be_scored(checkpoint, store_path):
    lm = PromptDBLM(checkpoint, db=store_path, device="cpu", max_length=8)
    with pytest.raises(PromptError, match="0 tokens of context"):
        lm.loglikelihood(requests(("  ", "x")), disable_tqdm=True)
    with pytest.raises(PromptError, match="at most 8 fit"):
        lm.loglikelihood(requests(("x", "a prompt is stored under hash" * 9)), disable_tqdm=True)


def test_lm_eval_finds_the_model():
    """In Python by its name; and as an entry point, which versions of lm_eval after 0.4.13 read."""
    assert get_model("promptdb") is PromptDBLM
    assert get_model("hf") is HFLM
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    assert name == "promptdb"
    assert EntryPoint(name, value, "lm_eval.models").load() is PromptDBLM
