"""``engine.generate`` returns exactly what ``model.generate`` returns."""

from __future__ import annotations

import pytest
import torch
from conftest import SUPPORTED, TEXT, shared_model, shared_tokenizer
from transformers import GenerationConfig

from promptdb import Engine
from promptdb.demo_models import random_model
from promptdb.errors import InputTypeError

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "scores": {"do_sample": False, "output_scores": True, "return_dict_in_generate": True},
}


def plain(model, ids, **options):
    torch.manual_seed(0)
    inputs = torch.tensor([ids])
    return model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, **options)


def through_engine(engine, prompt, **options):
    torch.manual_seed(0)
    return engine.generate(prompt, max_new_tokens=12, **options)


@pytest.mark.parametrize("arch", SUPPORTED)
def test_greedy_on_every_architecture(arch, db):
    model, tokenizer = shared_model(arch), shared_tokenizer()
    ids = tokenizer(TEXT).input_ids
    expected = plain(model, ids, do_sample=False)
    with Engine(db, model, tokenizer) as engine:
        for _ in range(2):  # computed, then loaded
            assert torch.equal(through_engine(engine, TEXT, do_sample=False), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_every_way(arch, way, db):
    model, tokenizer = shared_model(arch), shared_tokenizer()
    expected = plain(model, tokenizer(TEXT).input_ids, **WAYS[way])
    with Engine(db, model, tokenizer) as engine:
        engine.get(TEXT[:50])
        for _ in range(2):
            got = through_engine(engine, TEXT, **WAYS[way])
            if way == "scores":
                assert torch.equal(got.sequences, expected.sequences)
                for one, other in zip(got.scores, expected.scores, strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
            else:
                assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_caches_of_its_own_run_untouched(options, db):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    expected = plain(model, tokenizer(TEXT).input_ids, do_sample=False, **options)
    with Engine(db, model, tokenizer) as engine:
        assert torch.equal(through_engine(engine, TEXT, do_sample=False, **options), expected)


def test_drafts_of_its_own_run_untouched(db):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    options = {"do_sample": False, "assistant_early_exit": 1}
    expected = plain(model, tokenizer(TEXT).input_ids, **options)
    with Engine(db, model, tokenizer) as engine:
        assert torch.equal(through_engine(engine, TEXT, **options), expected)


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
)
def test_what_a_configuration_leaves_open_is_as_the_models_own_says(own, db, monkeypatch):
    model, tokenizer = random_model("llama"), shared_tokenizer()
    for name, value in own.items():
        monkeypatch.setattr(model.generation_config, name, value)
    config = {"generation_config": GenerationConfig(max_new_tokens=12)}
    torch.manual_seed(0)
    expected = model.generate(**tokenizer(TEXT, return_tensors="pt"), **config)
    with Engine(db, model, tokenizer) as engine:
        torch.manual_seed(0)
        assert torch.equal(engine.generate(TEXT, **config), expected)


def test_one_token_prompt(db):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        assert torch.equal(through_engine(engine, [5], do_sample=False), plain(model, [5], do_sample=False))


def test_generating_twice_does_not_change_what_is_stored(db):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        before = engine.get(TEXT).past_key_values().layers[0].keys.clone()
        through_engine(engine, TEXT, num_beams=2, do_sample=False)
        engine._extender.held = None
        assert torch.equal(engine.get(TEXT).past_key_values().layers[0].keys, before)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "past_key_values", "inputs_embeds"])
def test_what_it_sets_itself_is_refused(name, db):
    with Engine(db, shared_model("llama"), shared_tokenizer()) as engine, pytest.raises(InputTypeError, match=name):
        engine.generate("Hello", **{name: None})
