"""However a prompt is cut, stored, reopened and extended: the same as one forward pass of transformers."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import REFUSED, SUPPORTED, TEXT, shared_model, shared_tokenizer
from transformers import DynamicCache

from promptdb import Engine, PromptDB
from promptdb.errors import UnsupportedModelError

TOLERANCE = 1e-5


def reference(model, token_ids):
    """One pass of plain transformers: logits, log-probabilities, and the keys and values of every token."""
    cache = DynamicCache()  # without a configuration: sliding layers then keep all tokens as well
    with torch.no_grad():
        logits = model(torch.tensor([token_ids]), past_key_values=cache, use_cache=True).logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)[:-1]
    chosen = logprobs.gather(1, torch.tensor(token_ids)[1:, None])[:, 0].float()
    return logits, chosen, [(layer.keys, layer.values) for layer in cache.layers]


def assert_equal(representation, expected, num_tokens):
    logits, logprobs, layers = expected
    torch.testing.assert_close(representation.logits, logits[num_tokens - 1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(representation.token_logprobs, logprobs[: num_tokens - 1], rtol=0, atol=TOLERANCE)
    cache = representation.past_key_values()
    assert cache.get_seq_length() == num_tokens
    assert len(cache.layers) == len(layers)
    for layer, (keys, values) in zip(cache.layers, layers, strict=True):
        torch.testing.assert_close(layer.keys, keys[:, :, :num_tokens], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(layer.values, values[:, :, :num_tokens], rtol=0, atol=TOLERANCE)


def random_pieces(rng, text):
    places = sorted(rng.sample(range(1, len(text)), k=min(rng.randint(0, 6), len(text) - 1)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("arch", SUPPORTED)
def test_any_way_of_cutting_storing_and_extending(arch, tmp_path):
    model, tokenizer = shared_model(arch), shared_tokenizer()
    rng = random.Random(arch)
    token_ids = tokenizer(TEXT).input_ids
    assert len(token_ids) > 64, "longer than the sliding windows of 16"
    expected = reference(model, token_ids)
    text = TEXT
    for chunk_tokens in (7, 256):
        path = tmp_path / f"{chunk_tokens}.promptdb"
        stored = 0
        for _ in range(4):
            # Another process would open it so; what was stored must hold without the objects that stored it.
            with PromptDB(path, chunk_tokens=chunk_tokens) as db, Engine(db, model, tokenizer) as engine:
                cut_at = rng.randint(1, len(text))
                representation = engine.get(random_pieces(rng, text[:cut_at]))
                ids = list(representation.token_ids)
                if ids == token_ids[: len(ids)]:
                    assert_equal(representation, expected, len(ids))
                    assert representation.tokens_loaded + representation.tokens_computed == len(ids)
                    # One token may be computed again for the log-probability of the one after it.
                    assert representation.tokens_loaded >= min(stored, len(ids)) - 1
                    stored = max(stored, len(ids))
        with PromptDB(path) as db, Engine(db, model, tokenizer) as engine:
            assert_equal(engine.get(text), expected, len(token_ids))
        with PromptDB(path) as db, Engine(db, model, tokenizer) as engine:
            whole = engine.get(text)
            assert (whole.tokens_loaded, whole.tokens_computed) == (len(token_ids), 0)
            assert_equal(whole, expected, len(token_ids))
            # A prefix that ends inside a stored span: its logits are not stored, so one token is computed.
            for end in sorted(rng.sample(range(2, len(token_ids)), 3)):
                part = engine.get(token_ids[:end])
                assert_equal(part, expected, end)
                assert part.tokens_computed <= 1
                assert engine.get(token_ids[:end]).tokens_computed == 0
            assert db.verify() == []


@pytest.mark.parametrize("arch", SUPPORTED)
def test_attaching_in_the_middle_of_a_span(arch, db):
    model, tokenizer = shared_model(arch), shared_tokenizer()
    token_ids = tokenizer(TEXT).input_ids[:60]
    other = [*token_ids[:41], 5, 6, 7, 8, 9]
    with Engine(db, model, tokenizer) as engine:
        engine.get(token_ids)
        representation = engine.get(other)
        assert representation.tokens_loaded == 40
        assert_equal(representation, reference(model, other), len(other))
        # The logits at the parting point are stored now: a third branch computes its own tokens only.
        engine.flush()
        third = engine.get([*token_ids[:41], 11, 12])
        assert (third.tokens_loaded, third.tokens_computed) == (41, 2)
        assert_equal(third, reference(model, [*token_ids[:41], 11, 12]), 43)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mistral", "gemma2", "gemma3_text", "falcon", "bloom"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations(arch, attention, db):
    from promptdb.demo_models import random_model

    try:
        model = random_model(arch)
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{arch} has no {attention} attention")
    tokenizer = shared_tokenizer()
    token_ids = tokenizer(TEXT).input_ids[:70]
    expected = reference(model, token_ids)
    with Engine(db, model, tokenizer) as engine:
        engine.get(token_ids[:33])
        representation = engine.get(token_ids)
        assert representation.tokens_loaded == 33
        assert_equal(representation, expected, 70)


@pytest.mark.parametrize("arch", REFUSED)
def test_states_that_are_more_than_keys_and_values_are_refused_by_name(arch, db):
    with pytest.raises(UnsupportedModelError, match=arch):
        Engine(db, shared_model(arch), shared_tokenizer())
    assert db.stat()["num_nodes"] == 0
    assert db.registry.models() == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype_and_its_bits(dtype, db):
    from promptdb.demo_models import random_model

    model, tokenizer = random_model("llama", dtype=dtype), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        computed = engine.get(TEXT)
        computed_cache = computed.past_key_values()
    with Engine(db, model, tokenizer) as engine:
        loaded = engine.get(TEXT)
        assert loaded.tokens_computed == 0
        assert loaded.logits.dtype == model.dtype
        assert torch.equal(loaded.logits, computed.logits)
        assert torch.equal(loaded.token_logprobs, computed.token_logprobs)
        for one, other in zip(loaded.past_key_values().layers, computed_cache.layers, strict=True):
            assert one.keys.dtype == model.dtype
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)
        # Extending goes on in the same dtype.
        extended = engine.get(TEXT + " And more.")
        assert extended.past_key_values().layers[0].keys.dtype == model.dtype


def test_long_prompts_are_computed_in_passes(db, monkeypatch):
    from promptdb import runner

    monkeypatch.setattr(runner.Runner.extend, "__kwdefaults__", {"keep_all": False, "pass_tokens": 13})
    model, tokenizer = shared_model("gemma3_text"), shared_tokenizer()
    token_ids = tokenizer(TEXT).input_ids
    with Engine(db, model, tokenizer) as engine:
        assert_equal(engine.get(token_ids), reference(model, token_ids), len(token_ids))


def test_all_logits_on_request(db):
    model, tokenizer = shared_model("qwen3"), shared_tokenizer()
    token_ids = tokenizer(TEXT).input_ids
    logits, logprobs, _ = reference(model, token_ids)
    with Engine(db, model, tokenizer) as engine:
        for _ in range(2):  # stored or not
            representation = engine.get(token_ids, logits="all")
            torch.testing.assert_close(representation.logits, logits, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(representation.token_logprobs, logprobs, rtol=0, atol=TOLERANCE)
        assert engine.get(token_ids).tokens_computed == 0
