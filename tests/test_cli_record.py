"""record and activations: what people and programs see, and files that other libraries read."""

import json

import pytest
import torch
from cli_tools import run, run_json, run_lines, write_checkpoint
from safetensors.torch import load_file

from promptdb import PromptDB
from promptdb.demo_text import byte_tokenizer

TEXTS = ["Hello there. General", "Hello there. Major", "Naïve café: 你好 🙂"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_record_list_and_export(checkpoint, prompts, store_path, tmp_path):
    options = ("--model", checkpoint, "--db", store_path)
    found = run_lines(
        "record", *options, "--points", "post-mlp,blocks.0.hook_mlp_out", "--layers=-1", "--file", prompts
    )
    encoded = [byte_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert [each["num_tokens"] for each in found] == list(map(len, encoded))
    assert found[0]["points"] == [{"point": "post-mlp", "layer": 1}, {"point": "mlp-residual", "layer": 0}]
    distinct = {tuple(tokens[: n + 1]) for tokens in encoded for n in range(len(tokens))}
    # The token after which prompts part may be computed twice: the logits there were not stored.
    assert sum(each["tokens_computed"] for each in found) - len(distinct) in (0, 1)
    again = run_lines("record", *options, "--points", "post-mlp", "--layers", "1", "--file", prompts)
    assert [each["tokens_computed"] for each in again] == [0, 0, 0]
    listed = run_json("activations", "ls", "--db", store_path)["activations"]
    assert [(each["point"], each["layer"], each["dtype"]) for each in listed] == [
        ("mlp-residual", 0, "F32"),
        ("post-mlp", 1, "F32"),
    ]
    count = listed[0]["num_tokens"]
    assert count == len(distinct) < sum(map(len, encoded))
    assert f"{count}" in run("activations", "ls", "--db", store_path).stdout
    table = run("record", *options, "--points", "post-mlp", "--layers", "0-1", "--file", prompts).stdout
    assert "3 prompts" in table

    out = tmp_path / "out"
    where = ("--point", "post-mlp", "--layer", "1", "--db", store_path)
    report = run_json("activations", "export", out, *where, "--shard", "1KB", "--model", checkpoint)
    manifest = json.loads((out / "manifest.json").read_text())
    assert report["num_rows"] == manifest["num_rows"] == count
    assert report["num_files"] == len(manifest["files"]) > 1
    rows = {}
    for file in manifest["files"]:
        tensors = load_file(out / file["name"])
        for token, position, row in zip(
            tensors["token_ids"].tolist(), tensors["positions"].tolist(), tensors["rows"], strict=True
        ):
            rows.setdefault((token, position), []).append(row)
    with PromptDB(store_path, readonly=True) as db:
        for text, tokens in zip(TEXTS, encoded, strict=True):
            whole = db.activations(text, "post-mlp", 1)
            for position, token in enumerate(tokens):
                assert any(torch.equal(row, whole[position]) for row in rows[token, position])
    run("activations", "export", out, *where, code=2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--points", "post-mlpp"), "no point"),
        (("--points", "post-mlp", "--layers", "7"), "the model has 2"),
        (("--points", "post-mlp", "--layers", "one"), "no number"),
        (("--points", ","), "nothing to record"),
        (("--points", "unreduced-loss"), "token_logprobs"),
        (("--points", "post-mlp", "--as", "int8"), "cannot be stored"),
    ],
)
def test_wrong_points_are_refused(checkpoint, store_path, arguments, reason):
    result = run("record", "--model", checkpoint, "--db", store_path, *arguments, "Hello", code=2)
    assert reason in result.stderr


def test_probabilities_are_recorded_listed_and_not_exported(checkpoint, store_path, tmp_path):
    where = ("--model", checkpoint, "--db", store_path, "--points", "attn-probs,blocks.1.attn.hook_attn_scores")
    (found,) = run_lines("record", *where, "--layers", "1", "Hello there")
    assert found["points"] == [{"point": "attn-probs", "layer": 1}, {"point": "post-mask-attn-weights", "layer": 1}]
    listed = run_json("activations", "ls", "--db", store_path)["activations"]
    assert [(each["point"], each["row_shape"][1]) for each in listed] == [
        ("post-mask-attn-weights", -1),
        ("attn-probs", -1),
    ]
    with PromptDB(store_path, readonly=True) as db:
        probs, scores = (db.activations("Hello there", name, 1) for name in ("attn-probs", "post-mask-attn-weights"))
        assert torch.allclose(scores.softmax(-1), probs, atol=1e-6)
    options = ("--point", "attn-probs", "--layer", "1", "--db", store_path)
    assert "as long as the text" in run("activations", "export", tmp_path / "out", *options, code=2).stderr


def test_nothing_recorded(checkpoint, store_path, tmp_path):
    run("put", "--model", checkpoint, "--db", store_path, "Hello")
    assert "Nothing is recorded" in run("activations", "ls", "--db", store_path).stdout
    assert run_json("activations", "ls", "--db", store_path) == {"activations": []}
    where = ("--point", "post-mlp", "--layer", "0", "--db", store_path)
    assert "nothing is recorded" in run("activations", "export", tmp_path / "out", *where, code=2).stderr
    assert not (tmp_path / "out").exists()
