"""artifacts and activations plot: what people and programs see."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from cli_tools import run, run_json
from matplotlib.image import imread
from safetensors.torch import load_file
from test_pictures import texts
from test_shards import ROOT, record

from promptdb import PromptDB
from promptdb.artifact_records import blob_key
from promptdb.demo_text import byte_tokenizer
from promptdb.errors import InputTypeError, NotRecordedError
from promptdb.format import ARTIFACTS
from promptdb.keys import pack_tokens


@pytest.fixture
def store(store_path):
    with PromptDB(store_path) as db:
        db.artifacts.save(
            "probe/é",
            tensors={"weight": torch.arange(6.0).view(2, 3)},
            columns={"epoch": list(range(8)), "text": [f"line\n{n}, é" for n in range(8)]},
            config={"lr": 0.001},
            plot={"kind": "line", "y": "epoch", "y_label": "epoch (count)"},
            notes="one\x1b[31m\ntwo",
        )
        db.artifacts.save("empty")
    return store_path


def test_list_show_and_remove(store):
    found = run_json("artifacts", "ls", "--db", store)["artifacts"]
    assert [each["name"] for each in found] == ["empty", "probe/é"]
    assert found[1]["config"] == {"lr": 0.001}
    assert found[1]["columns"] == ["epoch", "text"]
    table = run("artifacts", "ls", "--db", store).stdout
    assert "probe/é" in table
    assert "line" in table
    shown = run("artifacts", "show", "probe/é", "--db", store).stdout
    assert all(text in shown for text in ("2 × 3", "F32", '{"lr": 0.001}', "one\\x1b[31m\n", "two", "… 3 more"))
    assert "\x1b" not in shown
    document = run_json("artifacts", "show", "probe/é", "--db", store)
    assert document["columns"]["text"][7] == "line\n7, é"
    assert document["tensors"] == {"weight": {"dtype": "F32", "shape": [2, 3]}}
    assert "2, " in run("stat", "--db", store).stdout.partition("artifacts")[2]
    assert run_json("stat", "--db", store)["num_artifacts"] == 2
    assert run_json("artifacts", "rm", "empty", "--db", store) == {"removed": ["empty"]}
    assert "no artifact 'empty'" in run("artifacts", "rm", "empty", "--db", store, code=1).stderr
    assert "no artifact 'empty'" in run("artifacts", "show", "empty", "--db", store, code=1).stderr
    run("artifacts", "rm", "probe/é", "--db", store)
    assert "No artifact is kept" in run("artifacts", "ls", "--db", store).stdout


def test_plot(store, tmp_path):
    run("artifacts", "plot", "probe/é", "--out", tmp_path / "x.svg", "--db", store)
    assert "epoch (count)" in texts(tmp_path / "x.svg")
    result = run("artifacts", "plot", "empty", "--out", tmp_path / "x.svg", "--db", store, code=2)
    assert "has no plot" in result.stderr
    result = run("artifacts", "plot", "probe/é", "--out", tmp_path / "x", "--db", store, code=2)
    assert "no name of a picture" in result.stderr
    run("artifacts", "plot", "nothing", "--out", tmp_path / "y.svg", "--db", store, code=1)


def test_export(store, tmp_path):
    out = tmp_path / "out"
    found = run_json("artifacts", "export", "probe/é", out, "--db", store)
    assert found["files"] == ["tensors.safetensors", "columns.csv", "artifact.json"]
    assert torch.equal(load_file(out / "tensors.safetensors")["weight"], torch.arange(6.0).view(2, 3))
    with (out / "columns.csv").open(newline="", encoding="utf-8") as stream:
        lines = list(csv.reader(stream))
    assert lines[0] == ["epoch", "text"]
    assert lines[8] == ["7", "line\n7, é"]
    assert json.loads((out / "artifact.json").read_text(encoding="utf-8"))["notes"] == "one\x1b[31m\ntwo"
    assert "is there already" in run("artifacts", "export", "probe/é", out, "--db", store, code=2).stderr
    run("artifacts", "export", "empty", tmp_path / "e", "--db", store)
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["artifact.json"]


def test_a_damaged_one_shows_what_is_left(store):
    with PromptDB(store) as db:

        def flip(writer):
            value = bytearray(writer.get(ARTIFACTS, blob_key("probe/é")))
            value[-1] ^= 1
            writer.put(ARTIFACTS, blob_key("probe/é"), value)

        db._index.transact(flip)
    shown = run("artifacts", "show", "probe/é", "--db", store, code=1).stdout
    assert "checksum of the numbers" in shown
    assert '{"lr": 0.001}' in shown
    assert "artifacts" in run("verify", "--db", store, code=1).stdout
    run("verify", "--fix", "--db", store, code=None)
    assert [each["name"] for each in run_json("artifacts", "ls", "--db", store)["artifacts"]] == ["empty"]


# Pictures of activations

TEXT = "Naïve $x$ 你好, done"


@pytest.fixture
def recorded(store_path):
    """A store with rows of tokens that are bytes of a text, of three layers; every second row of the last span."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    fields = {"json": tokenizer.backend_tokenizer.to_str(), "encode_special_tokens": False}
    with PromptDB(store_path, chunk_tokens=8) as db:
        db.registry.add_tokenizer(ROOT.tokenizer_id, fields)
        for layer in (0, 1, 5):
            record(db, [ids], layer=layer)
        record(db, [ids], dtype="bfloat16", point="pre-mlp", layer=0)
        record(db, [ids], dtype="float16", point="pre-mlp", layer=1)
    return store_path, ids


def check_norms(db, ids, point, norms):
    found = missing = 0
    for series, values in zip(norms.series, norms.values, strict=True):
        for position, value in enumerate(values):
            if math.isnan(value):
                missing += 1
                continue
            row = db.activations(pack_tokens(ids), point, series.layer, positions=position)
            assert value == pytest.approx(row.double().norm().item(), rel=1e-9)
            found += 1
    return found, missing


def test_norms_are_those_of_the_rows(recorded):
    path, ids = recorded
    with PromptDB(path, readonly=True) as db:
        norms = db.activation_norms(pack_tokens(ids), "post-mlp")
        assert [series.layer for series in norms.series] == [0, 1, 5]
        found, missing = check_norms(db, ids, "post-mlp", norms)
        assert found + missing == 3 * len(ids)
        assert missing
        assert all(map(math.isnan, db.activation_norms([*ids, 1], "post-mlp", [0]).values[0][-1:]))
        for layer, dtype in ((0, "BF16"), (1, "F16")):
            norms = db.activation_norms(TEXT, "pre-mlp", [layer])
            assert norms.series[0].dtype == dtype
            check_norms(db, ids, "pre-mlp", norms)
        assert db.activation_norms(TEXT, "blocks.1.hook_resid_post").series[0].layer == 1
        with pytest.raises(InputTypeError, match="recorded as BF16, F16"):
            db.activation_norms(TEXT, "pre-mlp")
        for point, layers in (("post-mlp", [2]), ("post-attn", None)):
            with pytest.raises(NotRecordedError, match=f"nothing is recorded of {point}"):
                db.activation_norms(TEXT, point, layers)


def test_activations_are_drawn(recorded, tmp_path):
    path, ids = recorded
    where = ("--point", "post-mlp", "--db", path)
    for show in ("heatmap", "layers", "positions"):
        out = tmp_path / f"{show}.svg"
        result = run("activations", "plot", *where, "--show", show, "--out", out, TEXT)
        assert f"3 layers, {len(ids)} tokens; " in result.stdout
        assert any("Euclidean norm of post-mlp" in text for text in texts(out))
    found = texts(tmp_path / "heatmap.svg")
    assert {"0 N", "layer", "position and token", "5"} <= set(found)
    assert {"mean", "median"} <= set(texts(tmp_path / "layers.svg"))
    assert {"layer 0", "layer 5"} <= set(texts(tmp_path / "positions.svg"))
    document = run_json("activations", "plot", *where, "--layers", "0,5", "--log", "--out", tmp_path / "x.png", TEXT)
    assert [each["layer"] for each in document["layers"]] == [0, 5]
    assert document["token_ids"] == ids
    assert None in document["layers"][0]["norms"]
    pixels = imread(tmp_path / "x.png")
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[-1]).tolist()}) > 10


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--point", "post-attn", "--out", "x.png"), 2, "nothing is recorded of post-attn"),
        (("--point", "post-mlp", "--layers", "7", "--out", "x.png"), 2, "of layer 7"),
        (("--point", "post-mlp", "--out", "x.gif"), 2, "no name of a picture"),
        (("--point", "post-mlp", "--namespace", "n", "--out", "x.png"), 1, "0 models"),
        (("--point", "post-mlp", "--model", "nothing", "--out", "x.png"), 1, "knows no model"),
        (("--point", "post-mlpp", "--out", "x.png"), 2, "post-mlpp"),
    ],
)
def test_what_cannot_be_drawn_says_why(recorded, tmp_path, monkeypatch, arguments, code, reason):
    monkeypatch.chdir(tmp_path)
    result = run("activations", "plot", *arguments, "--db", recorded[0], TEXT, code=code)
    assert reason in result.stderr
    assert not list(tmp_path.glob("x.*"))


def test_exports_in_other_formats(recorded, tmp_path):
    path, _ = recorded
    where = ("--point", "post-mlp", "--layer", "5", "--db", path)
    for file_format, name in (("parquet", "rows-00000.parquet"), ("zarr", "activations.zarr")):
        out = tmp_path / file_format
        report = run_json("activations", "export", out, *where, "--format", file_format, "--shard", "1MB")
        assert (out / name).exists()
        assert json.loads((out / "manifest.json").read_text())["num_rows"] == report["num_rows"] > 10
        assert "holds an export already" in run("activations", "export", out, *where, code=2).stderr
    assert "csv" in run("activations", "export", tmp_path / "c", *where, "--format", "csv", code=2).stderr
