"""Ordinary calls inside of ``cached`` give what they give outside: from the store, or untouched."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cached_tools import CLOSE, check_cache, check_output, outcome, plain, prompt
from conftest import SUPPORTED, TEXT, shared_model, shared_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from promptdb import PromptDB
from promptdb.calls import cached
from promptdb.demo_models import random_model
from promptdb.errors import IdentityError, ModelError, StoreError, UnsupportedModelError
from promptdb.identity import weights_id

FEW = ("gpt2", "llama", "gemma3_text", "falcon", "mpt", "qwen3_moe")


def several(rows=3, tokens=40):
    ids = prompt()[0]
    return torch.stack([ids[start : start + tokens] for start in range(0, 7 * rows, 7)])


def generated(model, ids, **options):
    torch.manual_seed(0)
    # mpt's configuration says to use no cache: every step is then a prompt of its own, and is served.
    options = {"max_new_tokens": 8, "attention_mask": torch.ones_like(ids), "use_cache": True, **options}
    return model.generate(ids, **options)


@pytest.mark.parametrize("arch", SUPPORTED)
def test_every_architecture(arch, db):
    model, ids = shared_model(arch), prompt()
    token = torch.tensor([[7]])
    full, last, tokens = plain(model, ids), plain(model, ids, logits_to_keep=1), generated(model, ids, do_sample=False)
    with cached(model, shared_tokenizer(), db) as calls:
        for turn in range(2):
            check_output(plain(model, ids, logits_to_keep=1), last)
            assert torch.equal(generated(model, ids, do_sample=False), tokens)
            assert calls.tokens_computed == ids.shape[1], turn
        check_output(plain(model, ids), full)
        assert calls.tokens_computed == 2 * ids.shape[1]  # logits of all positions are not stored
        ours = plain(model, ids, logits_to_keep=1, use_cache=True).past_key_values
        theirs = plain(model, ids, use_cache=False)
        before = calls.untouched_calls
        step = plain(model, token, past_key_values=ours, use_cache=True)
        assert calls.untouched_calls == before + 1
        assert calls.reasons["continues a cache"]
        assert step.past_key_values is ours
        assert ours.get_seq_length() == ids.shape[1] + 1
        check_output(theirs, plain(model, ids, use_cache=False))
    reference = plain(model, torch.cat([ids, token], 1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(step.logits[:, -1], reference, **CLOSE)


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "scores": {"do_sample": False, "output_scores": True, "output_logits": True, "return_dict_in_generate": True},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "chunks": {"do_sample": False, "prefill_chunk_size": 10},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "hidden states": {"do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3, "bad_words_ids": [[5], [6, 7]]},
}


# Rows are served by what does not know the architecture: two of them stand for all.
ROWS = [
    *((1, arch) for arch in FEW),
    *(pytest.param(3, arch, marks=() if arch in ("gpt2", "gemma3_text") else pytest.mark.slow) for arch in FEW),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "arch"), ROWS)
def test_every_way_of_generating(arch, way, rows, db):
    if way == "lookup" and rows > 1:
        pytest.skip("one prompt at a time, says transformers")
    model, options = shared_model(arch), WAYS[way]
    ids = prompt() if rows == 1 else several(rows)
    expected = generated(model, ids, **options)
    state = torch.get_rng_state()
    with cached(model, shared_tokenizer(), db) as calls:
        for _ in range(2):
            got = generated(model, ids, **options)
            assert torch.equal(torch.get_rng_state(), state)
            if not isinstance(expected, torch.Tensor):
                assert type(got) is type(expected)
                for one, other in zip(got.get("scores") or (), expected.get("scores") or (), strict=True):
                    torch.testing.assert_close(one, other, **CLOSE)
                check_cache(got.past_key_values, expected.past_key_values, same_class=True)
                assert torch.equal(got.sequences, expected.sequences)
            else:
                assert torch.equal(got, expected)
        if way in ("static cache", "hidden states"):
            assert calls.served_calls == 0
        elif way not in ("no cache", "chunks", "lookup"):
            assert calls.served_calls == 2
            assert calls.tokens_computed <= ids.numel()
            assert calls.tokens_loaded >= ids.numel()


@pytest.mark.parametrize("arch", FEW)
def test_a_callers_cache_is_filled_as_the_model_fills_it(arch, db):
    model = shared_model(arch)
    with cached(model, shared_tokenizer(), db) as calls:
        for ids in (prompt(), several()):
            for make in (DynamicCache, lambda: DynamicCache(config=model.config)):
                options = {"use_cache": True, "logits_to_keep": 1}
                ours, theirs = make(), make()
                got = plain(model, ids, past_key_values=ours, **options)
                assert got.past_key_values is ours
                calls.engine.model.forward.__wrapped__(ids, past_key_values=theirs, **options)
                check_cache(ours, theirs, same_class=True)
                step = torch.full((len(ids), 1), 9)
                check_output(
                    plain(model, step, past_key_values=ours, use_cache=True),
                    plain(model, step, past_key_values=theirs, use_cache=True),
                )
        assert calls.served_calls == 4


@pytest.mark.parametrize("arch", FEW)
def test_rows_are_served_one_by_one(arch, db):
    model, ids = shared_model(arch), several()
    ids = torch.cat([ids, ids[:1]])
    expected = [plain(model, ids, logits_to_keep=keep) for keep in (0, 1, 4)]
    with cached(model, shared_tokenizer(), db) as calls:
        for _ in range(2):
            for keep, output in zip((1, 0, 4), (expected[1], expected[0], expected[2]), strict=True):
                check_output(plain(model, ids, logits_to_keep=keep), output)
        assert calls.untouched_calls == 0
        before = calls.tokens_computed
        check_output(plain(model, ids, attention_mask=torch.ones_like(ids), logits_to_keep=1), expected[1])
        assert calls.tokens_computed == before


@pytest.mark.parametrize("arch", FEW)
def test_forms_of_an_ordinary_call(arch, db):
    model, ids = shared_model(arch), prompt()
    ones, places = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
    forms = [
        ((ids,), {}),
        ((ids.to(torch.int32),), {"logits_to_keep": 1}),
        ((), {"input_ids": ids, "attention_mask": ones.bool(), "labels": None, "inputs_embeds": None}),
        ((), {"input_ids": ids, "attention_mask": ones, "use_cache": False}),
        ((), {"input_ids": ids, "output_hidden_states": False, "output_attentions": None, "logits_to_keep": 3}),
        ((), {"input_ids": ids, "logits_to_keep": 10_000}),
        ((), {"input_ids": ids[:, :1]}),
    ]
    if "position_ids" in inspect.signature(model.forward).parameters:
        forms.append(((), {"input_ids": ids, "position_ids": places, "logits_to_keep": 1}))
    expected = [plain(model, *args, **kwargs) for args, kwargs in forms]
    tuples = [plain(model, *args, return_dict=False, **kwargs) for args, kwargs in forms]
    with cached(model, shared_tokenizer(), db) as calls:
        for (args, kwargs), output, values in zip(forms, expected, tuples, strict=True):
            check_output(plain(model, *args, **kwargs), output)
            got = plain(model, *args, return_dict=False, **kwargs)
            assert type(got) is tuple
            assert len(got) == len(values)
            torch.testing.assert_close(got[0], values[0], **CLOSE)
        assert calls.untouched_calls == 0, calls.reasons
        assert calls.served_calls == 2 * len(forms)


def test_defaults_of_the_configuration_count(db):
    model, ids = random_model("llama"), prompt()
    with cached(model, shared_tokenizer(), db) as calls:
        model.config.use_cache = False
        assert "past_key_values" not in plain(model, ids, logits_to_keep=1)
        model.config.use_cache, model.config.output_hidden_states = True, True
        assert len(plain(model, ids, logits_to_keep=1).hidden_states) == 3
        assert calls.served_calls == 1
        assert calls.reasons == {"output_hidden_states": 1}


def test_tuples_by_configuration(db):
    model, ids = random_model("gpt2"), prompt()
    with cached(model, shared_tokenizer(), db) as calls:
        model.config.return_dict = False
        got, theirs = outcome(model, {"input_ids": ids}), outcome(model.forward.__wrapped__, {"input_ids": ids})
        assert got == theirs  # an error: it reaches into the model
        assert calls.served_calls == 0


def test_last_logits(db):
    model, ids = shared_model("llama"), prompt()
    last, full = plain(model, ids, logits_to_keep=1), plain(model, ids)
    with cached(model, shared_tokenizer(), db, last_logits=True) as calls:
        for _ in range(2):
            check_output(plain(model, ids), last)
            assert calls.tokens_computed == ids.shape[1]
        check_output(plain(model, ids, logits_to_keep=0), full)  # said so


def test_prefixes_are_shared_between_calls_and_survive(store_path):
    model, ids = shared_model("gpt2"), prompt()
    half, expected = ids.shape[1] // 2, plain(model, ids, logits_to_keep=1)
    with cached(model, shared_tokenizer(), store_path) as calls:
        generated(model, ids[:, :half])
        generated(model, ids)
        assert calls.tokens_computed == ids.shape[1]
    with PromptDB(store_path) as db, cached(model, shared_tokenizer(), db) as calls:
        check_output(plain(model, ids, logits_to_keep=1), expected)
        assert (calls.tokens_loaded, calls.tokens_computed) == (ids.shape[1], 0)
    with PromptDB(store_path, readonly=True) as db, cached(model, shared_tokenizer(), db) as calls:
        expected = generated(model, ids[:, 3:])
        assert torch.equal(generated(model, ids[:, 3:]), expected)
        assert calls.served_calls == 2


def test_what_a_caller_does_with_results_stays_with_the_caller(db):
    model, ids = shared_model("llama"), prompt()
    expected = plain(model, ids, logits_to_keep=1)
    with cached(model, shared_tokenizer(), db):
        for _ in range(3):
            got = plain(model, ids, logits_to_keep=1)
            check_output(got, expected)
            got.logits.zero_()
            for layer in got.past_key_values.layers:
                layer.keys.zero_()
                layer.values.zero_()


def test_the_engine_may_be_used_inside(db):
    model, ids = random_model("llama"), prompt()
    with cached(model, shared_tokenizer(), db) as calls:
        for factor in (1.0, 1.5):
            with torch.no_grad():
                model.model.norm.weight.mul_(factor)
            theirs = calls.engine.get(TEXT)
            got = plain(model, ids, logits_to_keep=1)
            torch.testing.assert_close(got.logits[0, 0], theirs.logits, **CLOSE)
            expected = plain(model.forward.__wrapped__, ids).logits[0, -1]
            torch.testing.assert_close(theirs.logits, expected, **CLOSE)
        assert calls.tokens_loaded >= 2 * ids.shape[1]
        assert torch.equal(
            calls.engine.generate(TEXT, max_new_tokens=8, do_sample=False), generated(model, ids, do_sample=False)
        )


# What the block leaves behind


@pytest.mark.parametrize("arch", FEW)
def test_the_model_is_as_before(arch, db):
    model, ids = random_model(arch), prompt()
    before, kind, identity = list(vars(model).items()), type(model), weights_id(model)

    def check():
        after = list(vars(model).items())
        assert [name for name, _ in after] == [name for name, _ in before]
        assert all(one is other for (_, one), (_, other) in zip(after, before, strict=True))
        assert type(model) is kind
        assert weights_id(model) == identity

    parameters = inspect.signature(model.forward).parameters
    with cached(model, shared_tokenizer(), db) as calls:
        assert inspect.signature(model.forward).parameters == parameters
        assert type(model) is kind
        assert weights_id(model) == identity == calls.engine.root.weights_id
        plain(model, ids)
        generated(model, ids)
    check()
    with pytest.raises(ZeroDivisionError), cached(model, shared_tokenizer(), db):
        generated(model, ids, max_new_tokens=1 // 0)
    check()
    with pytest.raises(IndexError), cached(model, shared_tokenizer(), db):
        plain(model, ids + 5000)
    check()


def test_a_store_that_fails_says_so_and_leaves_the_model_alone(store_path):
    model = shared_model("llama")
    with cached(model, shared_tokenizer(), store_path) as calls:
        calls.engine.close()
        with pytest.raises(StoreError):
            plain(model, prompt())
    assert "forward" not in vars(model)
    with pytest.raises(StoreError), cached(model, shared_tokenizer(), store_path / "missing" / "\0"):
        pass
    assert "forward" not in vars(model)


def test_one_block_at_a_time(db):
    model, other = shared_model("llama"), shared_model("gpt2")
    expected = plain(model, prompt(), logits_to_keep=1)
    with cached(model, shared_tokenizer(), db) as calls:
        with pytest.raises(ModelError, match="already"), cached(model, shared_tokenizer(), db):
            pass
        with cached(other, shared_tokenizer(), db) as others:
            plain(other, prompt())
        check_output(plain(model, prompt(), logits_to_keep=1), expected)
        assert (calls.served_calls, others.served_calls) == (1, 1)
    with cached(model, shared_tokenizer(), db) as calls:
        check_output(plain(model, prompt(), logits_to_keep=1), expected)
        assert calls.tokens_computed == 0


def test_what_somebody_else_patches_inside_stays(db):
    model, ids = random_model("llama"), prompt()
    expected = plain(model, ids)
    with cached(model, shared_tokenizer(), db):
        ours = model.forward
        model.forward = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
        plain(model, ids)
    assert vars(model)["forward"] is theirs
    assert torch.equal(plain(model, ids).logits, expected.logits)  # ours lets everything through
    with cached(random_model("llama", seed=1), shared_tokenizer(), db):
        pass
    model.forward = type(model).forward.__get__(model)  # taken back by assignment
    before = vars(model)["forward"]
    with cached(model, shared_tokenizer(), db) as calls:
        check_output(plain(model, ids), expected)
        assert calls.served_calls == 1
    assert vars(model)["forward"] is before


def test_copies_are_models_of_their_own(db, tmp_path):
    model, ids = random_model("llama"), prompt()
    with cached(model, shared_tokenizer(), db) as calls:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        model.save_pretrained(tmp_path / "saved")
        for other in copies:
            with torch.no_grad():
                other.model.norm.weight.mul_(2)
        served = [plain(other, ids).logits for other in copies]
        assert calls.served_calls == 0
    for got in served:
        assert not torch.equal(got, plain(model, ids).logits)
        assert torch.equal(got, plain(copies[0], ids).logits)
    with cached(copies[0], shared_tokenizer(), db) as calls:
        torch.testing.assert_close(plain(copies[0], ids).logits, served[0], **CLOSE)
        assert calls.served_calls == 1


def test_a_compiled_model_is_the_model(db):
    model, ids = random_model("llama"), prompt()
    expected = plain(model, ids).logits
    with cached(model, shared_tokenizer(), db) as calls:
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(plain(compiled, ids, use_cache=False).logits, expected)
        assert calls.served_calls == 0
    torch._dynamo.reset()


def test_dispatched_by_accelerate(db):
    accelerate = pytest.importorskip("accelerate")
    model, ids = random_model("llama"), prompt()
    expected = plain(model, ids, logits_to_keep=1)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    before = vars(model)["forward"]
    with cached(model, shared_tokenizer(), db) as calls:
        for _ in range(2):
            check_output(plain(model, ids, logits_to_keep=1), expected)
        assert calls.tokens_computed == ids.shape[1]
    assert vars(model)["forward"] is before


def test_adapters(db):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(random_model("llama"), settings).eval()
    ids = prompt()
    expected, tokens = plain(model, ids, logits_to_keep=1), generated(model, input_ids := ids, do_sample=False)
    with model.disable_adapter():
        off = plain(model, ids, logits_to_keep=1)
    assert not torch.equal(off.logits, expected.logits)
    with cached(model, shared_tokenizer(), db) as calls:
        for _ in range(2):
            check_output(plain(model, ids, logits_to_keep=1), expected)
            assert torch.equal(generated(model, input_ids, do_sample=False), tokens)
            assert calls.tokens_computed == ids.shape[1]
        with model.disable_adapter():
            check_output(plain(model, ids, logits_to_keep=1), off)
        assert calls.tokens_computed == 2 * ids.shape[1]
        mixed = {"adapter_names": ["__base__"], "logits_to_keep": 1}
        torch.testing.assert_close(plain(model, ids, **mixed).logits, off.logits, **CLOSE)
        assert calls.reasons["IdentityError"] == 1
    assert "forward" not in vars(model.get_base_model())
    tuned = peft.get_peft_model(
        random_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(UnsupportedModelError, match="before the prompt"), cached(tuned.eval(), shared_tokenizer(), db):
        pass


@pytest.mark.parametrize("model", [None, 5, torch.nn.Linear(2, 2).eval()])
def test_what_is_no_model(model, db):
    with pytest.raises((UnsupportedModelError, IdentityError, TypeError)), cached(model, shared_tokenizer(), db):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_goes_to_the_model(db):
    model, ids = shared_model("gpt2"), prompt()
    expected = plain(model, ids, logits_to_keep=1).logits
    with cached(model, shared_tokenizer(), db) as calls:
        plain(model, ids, logits_to_keep=1)
        child = os.fork()
        if child == 0:  # pragma: no cover - in the child
            with calls._lock:  # even if another thread held it
                same = torch.equal(plain(model, ids, logits_to_keep=1).logits, expected)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert calls.served_calls == 1


def test_threads(db):
    model = shared_model("llama")
    prompts = [prompt()[:, : 20 + 3 * number] for number in range(12)]
    expected = [generated(model, ids, do_sample=False) for ids in prompts]
    together = threading.Barrier(4)

    def work(start):
        together.wait()
        order = prompts[start:] + prompts[:start]
        return [generated(model, ids, do_sample=False) for ids in order], start

    with cached(model, shared_tokenizer(), db) as calls:
        with ThreadPoolExecutor(4) as pool:
            for got, start in pool.map(work, (0, 3, 6, 9)):
                for one, other in zip(got, expected[start:] + expected[:start], strict=True):
                    assert torch.equal(one, other)
        assert calls.served_calls == 4 * len(prompts)
        assert set(calls.reasons) == {"continues a cache"}


# Anything in any order

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=24)  # three tokens: prompts share prefixes
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["call", "last", "some", "generate", "cache", "rows", "padding", "step", "reopen"]), TOKENS
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("arch", ["gpt2", "gemma3_text"])
@given(script=CALLS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_calls_in_any_order(arch, script, tmp_path_factory):
    model, tokenizer = shared_model(arch), shared_tokenizer()
    path = tmp_path_factory.mktemp("calls") / "store.promptdb"

    def run(kind, tokens):
        ids = torch.tensor([tokens]) + 5
        if kind == "generate":
            return generated(model, ids, do_sample=False, max_new_tokens=3)
        if kind == "step":
            cache = plain(model, ids, use_cache=True, logits_to_keep=1).past_key_values
            return plain(model, ids[:, :1], past_key_values=cache).logits
        options = {
            "last": {"logits_to_keep": 1},
            "some": {"logits_to_keep": 3, "use_cache": False},
            "cache": {"past_key_values": DynamicCache(config=model.config), "logits_to_keep": 1},
            "rows": {"logits_to_keep": 1},
            "padding": {"attention_mask": torch.tensor([[1] * (len(tokens) - 1) + [0]])},
        }.get(kind, {})
        return plain(model, torch.cat([ids, ids.flip(1)]) if kind == "rows" else ids, **options).logits

    expected = [run(kind, tokens) for kind, tokens in script]
    with PromptDB(path, chunk_tokens=4) as db:
        waiting = list(zip(script, expected, strict=True))
        while waiting:
            with cached(model, tokenizer, db):
                while waiting:
                    (kind, tokens), output = waiting.pop(0)
                    torch.testing.assert_close(run(kind, tokens), output, **CLOSE)
                    if kind == "reopen":
                        break
        assert db.verify() == []
    assert "forward" not in vars(model)
