"""Stored spans against a fresh computation: exact ones pass, changed ones are found."""

from __future__ import annotations

import pytest
import torch
from cli_tools import run, run_json, write_checkpoint
from conftest import TEXT, shared_model, shared_tokenizer

from promptdb import Engine, PromptDB
from promptdb.demo_models import random_model
from promptdb.errors import InputTypeError
from promptdb.recompute import recompute


@pytest.mark.parametrize("arch", ["gpt2", "gemma3_text", "mpt"])
def test_what_was_stored_is_what_is_computed(arch, db):
    with Engine(db, shared_model(arch), shared_tokenizer()) as engine:
        engine.get(["Hello there.", " General", " Kenobi"])
        list(engine.run([TEXT, TEXT + " And more.", TEXT[:50]]))
        found = recompute(engine, 1000)
        assert found.num_spans == db.stat()["num_nodes"]
        assert found.num_tokens == db.stat()["num_tokens"]
        assert found.is_exact
        assert 0 < found.worst < 1e-5
        assert found.logprobs < 1e-5
        assert len(found.layers) == engine.model.config.num_hidden_layers
        assert all(layer.largest_key > 0 and layer.largest_value > 0 for layer in found.layers)
        few = recompute(engine, 2, seed=1)
        assert few == recompute(engine, 2, seed=1)
        assert few.num_spans == 2


def test_a_changed_tensor_under_valid_checksums_is_found(db, monkeypatch):
    """Somebody else's blob under the right key: every checksum holds, and only computing tells."""
    from promptdb import storer

    encode = storer.encode_span

    def poisoned(source, start, end, scores, kv_codec):
        blobs = encode(source, start, end, scores, kv_codec)
        if start == 16:
            values = torch.frombuffer(blobs["kv"], dtype=torch.float32)
            values[-1] += 0.01
        return blobs

    monkeypatch.setattr(storer, "encode_span", poisoned)
    with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        engine.get(TEXT)
        engine.flush()
        assert db.verify() == []
        found = recompute(engine, 1000)
        assert not found.is_exact
        with db.read() as snapshot:
            assert snapshot.record(bytes.fromhex(found.worst_node)).start == 16
        worst = max(found.layers, key=lambda layer: layer.values)
        assert worst.layer == engine.model.config.num_hidden_layers - 1
        assert worst.values == pytest.approx(0.01, rel=1e-3)


def test_wrong_and_empty_samples(db):
    with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        empty = recompute(engine, 5)
        assert (empty.num_spans, empty.layers, empty.worst_node) == (0, (), "")
        for sample in (0, -1, 2.5):
            with pytest.raises(InputTypeError, match="sample"):
                recompute(engine, sample)


def test_other_models_spans_are_left_alone(db):
    with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        engine.get(TEXT)
    with Engine(db, random_model("llama", seed=7), shared_tokenizer()) as engine:
        assert recompute(engine, 10).num_spans == 0


def test_command(tmp_path):
    model, path = write_checkpoint(tmp_path / "model", "gpt2"), tmp_path / "store"
    with PromptDB(path) as db, Engine.from_pretrained(db, model) as engine:
        engine.get(TEXT)
    asked = ("verify", "--db", path, "--recompute", 5)
    assert "That is rounding" in run(*asked, "--model", model).output
    assert run_json(*asked, "--model", model)["recomputed"]["is_exact"] is True
    assert "go together" in run(*asked, code=2).output
