"""The same promises on a CUDA device; skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TEXT, shared_tokenizer

from promptdb import Engine, PromptDB
from promptdb.batch import BatchLimits
from promptdb.demo_models import random_model
from promptdb.identity import weights_id
from promptdb.offloading import offload

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mistral", "gemma2", "gemma3_text", "deepseek_v3"])
def test_loaded_and_extended_equals_one_pass(arch, db):
    model, tokenizer = random_model(arch).cuda(), shared_tokenizer()
    token_ids = tokenizer(TEXT).input_ids
    with torch.no_grad():
        expected = model(torch.tensor([token_ids], device="cuda")).logits[0]
    with Engine(db, model, tokenizer) as engine:
        engine.get(token_ids[:40])
    with Engine(db, model, tokenizer) as engine:
        got = engine.get(token_ids)
        assert got.tokens_loaded == 40
        assert got.logits.is_cuda
        torch.testing.assert_close(got.logits, expected[-1], rtol=0, atol=1e-4)
        again = engine.get(token_ids)
        assert again.tokens_computed == 0
        assert torch.equal(again.logits, got.logits)
        cache = again.past_key_values()
        assert cache.layers[0].keys.is_cuda


def test_every_byte_arrives(db):
    """Larger than one pinned stage, so that both are filled more than once."""
    model, tokenizer = random_model("llama", num_hidden_layers=16, hidden_size=512).cuda(), shared_tokenizer()
    token_ids = [5 + n % 400 for n in range(1000)]
    with Engine(db, model, tokenizer) as engine:
        computed = engine.get(token_ids).past_key_values()
    with Engine(db, model, tokenizer) as engine:
        loaded = engine.get(token_ids).past_key_values()
        for one, other in zip(loaded.layers, computed.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)


def test_weights_id_does_not_depend_on_the_device():
    model = random_model("llama")
    on_cpu = weights_id(model)
    assert weights_id(model.cuda()) == on_cpu


def test_stored_on_one_device_and_loaded_on_the_other(store_path):
    tokenizer = shared_tokenizer()
    with PromptDB(store_path) as db:
        with Engine(db, random_model("llama").cuda(), tokenizer) as engine:
            computed = engine.get(TEXT)
        with Engine(db, random_model("llama"), tokenizer) as engine:
            loaded = engine.get(TEXT)
            assert loaded.tokens_computed == 0
            torch.testing.assert_close(loaded.logits, computed.logits.cpu(), rtol=0, atol=0)
        with Engine(db, random_model("llama"), tokenizer, strict=True) as strict:
            assert strict.get(TEXT).tokens_loaded == 0


def test_generate(db):
    model, tokenizer = random_model("llama").cuda(), shared_tokenizer()
    ids = torch.tensor([tokenizer(TEXT).input_ids], device="cuda")
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    with Engine(db, model, tokenizer) as engine:
        engine.get(TEXT)
        assert torch.equal(engine.generate(TEXT, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize("way", ["packed", "batched", "single"])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
def test_a_batch_equals_one_by_one(arch, way, db):
    model, tokenizer = random_model(arch).cuda(), shared_tokenizer()
    token_ids = tokenizer(TEXT).input_ids
    prompts = [token_ids[:end] + [7, 8, 9][:extra] for end in (30, 50, 51) for extra in range(4)]
    limits = BatchLimits(pass_tokens=32, way=way)
    with Engine(db, model, tokenizer) as engine:
        engine.get(token_ids[:20])
        for _ in range(2):
            for got, prompt in zip(engine.run(prompts, limits=limits), prompts, strict=True):
                with torch.no_grad():
                    expected = model(torch.tensor([prompt], device="cuda")).logits[0]
                assert got.logits.is_cuda
                torch.testing.assert_close(got.logits, expected[-1], rtol=0, atol=1e-4)
        cache = engine.get(prompts[-1]).past_key_values()
        with torch.no_grad():
            plain = model(torch.tensor([prompts[-1]], device="cuda"), use_cache=True).past_key_values
        for one, other in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", ["memory", "files"])
def test_an_offloaded_model_finds_what_the_plain_one_stored(where, db, tmp_path):
    plain, tokenizer = random_model("llama"), shared_tokenizer()
    model = offload(copy.deepcopy(plain), "cuda", folder=None if where == "memory" else tmp_path / "weights")
    assert weights_id(model) == weights_id(plain)
    token_ids = tokenizer(TEXT).input_ids
    with Engine(db, plain, tokenizer) as engine:
        engine.get(token_ids[:40])
    with Engine(db, model, tokenizer) as engine:
        got = engine.get(token_ids)
        assert got.tokens_loaded == 40
        assert got.logits.is_cuda
    with torch.no_grad():
        torch.testing.assert_close(got.logits.cpu(), plain(torch.tensor([token_ids])).logits[0, -1], rtol=0, atol=1e-4)
    assert all(parameter.is_meta for parameter in model.parameters())
