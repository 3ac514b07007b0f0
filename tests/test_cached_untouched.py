"""Calls that are not for the store go to the model as they are."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from cached_tools import CLOSE, check_output, outcome, plain, prompt
from conftest import shared_model, shared_tokenizer
from transformers import DynamicCache, StaticCache

from promptdb.calls import cached
from promptdb.demo_models import random_model
from promptdb.errors import IdentityError, TrainModeError, UnsupportedModelError


def masked(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


def filled(model, ids):
    return plain(model, ids[:, :5], use_cache=True).past_key_values


UNTOUCHED = {
    "padding": lambda model, ids: {"input_ids": ids, "attention_mask": masked(ids)},
    "a mask of another shape": lambda model, ids: {"input_ids": ids, "attention_mask": torch.ones(1, 1)},
    "a mask of four dimensions": lambda model, ids: {
        "input_ids": ids,
        "attention_mask": torch.zeros(1, 1, ids.shape[1], ids.shape[1]),
    },
    "labels": lambda model, ids: {"input_ids": ids, "labels": ids},
    "embeddings": lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids)},
    "hidden states": lambda model, ids: {"input_ids": ids, "output_hidden_states": True},
    "attentions": lambda model, ids: {"input_ids": ids, "output_attentions": True},
    "other positions": lambda model, ids: {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None] + 2},
    "some logits": lambda model, ids: {"input_ids": ids, "logits_to_keep": torch.tensor([1, 4])},
    "negative count": lambda model, ids: {"input_ids": ids, "logits_to_keep": -3},
    "static cache": lambda model, ids: {
        "input_ids": ids,
        "past_key_values": StaticCache(config=model.config, max_cache_len=200),
    },
    "a cache that is not used": lambda model, ids: {
        "input_ids": ids,
        "past_key_values": DynamicCache(),
        "use_cache": False,
    },
    "a filled cache": lambda model, ids: {"input_ids": ids[:, 5:], "past_key_values": filled(model, ids)},
    "no cache at all": lambda model, ids: {"input_ids": ids, "past_key_values": 5},
    "no input": lambda model, ids: {},
    "both inputs": lambda model, ids: {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)},
    "one dimension": lambda model, ids: {"input_ids": ids[0]},
    "no tokens": lambda model, ids: {"input_ids": ids[:, :0]},
    "no rows": lambda model, ids: {"input_ids": ids[:0]},
    "floats": lambda model, ids: {"input_ids": ids.float()},
    "bytes": lambda model, ids: {"input_ids": ids.to(torch.uint8)},
    "a list": lambda model, ids: {"input_ids": ids.tolist()},
    "beyond the vocabulary": lambda model, ids: {"input_ids": ids + 500},
    "below the vocabulary": lambda model, ids: {"input_ids": ids - 500},
    "beyond the positions": lambda model, ids: {"input_ids": ids.repeat(1, 9)},
    "an unknown keyword": lambda model, ids: {"input_ids": ids, "nobody_knows": 1},
    "packed sequences": lambda model, ids: {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(4), torch.arange(ids.shape[1] - 4)])[None],
    },
    "token types": lambda model, ids: {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)},
}


def check_exactly(got, expected):
    assert got[0] is expected[0]
    assert got[1] == expected[1]
    if issubclass(got[0], Exception):
        assert got[2] is expected[2]
        return
    for one, other in zip(got[2], expected[2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", UNTOUCHED)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_untouched(arch, case, db):
    model, make = shared_model(arch), UNTOUCHED[case]
    expected = outcome(model, make(model, prompt()))
    with cached(model, shared_tokenizer(), db) as calls:
        plain(model, prompt(), logits_to_keep=1)
        kwargs = make(model, prompt())  # "a filled cache" is served here
        before = calls.untouched_calls, calls.served_calls
        check_exactly(outcome(model, kwargs), expected)
        assert (calls.untouched_calls, calls.served_calls) == (before[0] + 1, before[1])


def test_ids_on_another_device_are_the_models_business(db):
    model = shared_model("gpt2")
    with cached(model, shared_tokenizer(), db) as calls:
        outcome(model, {"input_ids": prompt().to("meta")})  # whatever that is
        assert (calls.served_calls, calls.untouched_calls) == (0, 1)


def test_an_argument_that_does_not_fit(db):
    model = shared_model("llama")
    with cached(model, shared_tokenizer(), db), pytest.raises(TypeError, match="multiple values"):
        model(prompt(), input_ids=prompt())


def train(model):
    model.train()


def train_a_part(model):
    model.model.layers[1].train()


def patch(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def patch_and_pretend(model):
    forward = model.forward

    @functools.wraps(forward)  # takes over all attributes of what it wraps
    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled


def hook(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


def compile_a_layer(model):
    model.model.layers[0].compile(backend="eager")


@pytest.mark.parametrize("change", [train, train_a_part, patch, patch_and_pretend, hook, compile_a_layer])
def test_a_model_that_cannot_be_used_any_more(change, db):
    model, ids = random_model("llama"), prompt()
    for module in model.modules():  # no dropout: what train mode gives can be compared
        module.p = 0.0
    other = copy.deepcopy(model)
    change(other)
    expected = plain(other, ids, logits_to_keep=1)
    with cached(model, shared_tokenizer(), db) as calls:
        plain(model, ids, logits_to_keep=1)
        change(model)
        got = plain(model, ids, logits_to_keep=1)
        assert torch.equal(got.logits, expected.logits)
        assert (calls.served_calls, calls.untouched_calls) == (1, 1)
    with pytest.raises((IdentityError, TrainModeError, UnsupportedModelError)), cached(model, shared_tokenizer(), db):
        pass


def test_gradients_reach_the_weights(db):
    model, ids = random_model("llama"), prompt()
    expected = torch.autograd.grad(model(ids).logits.sum(), model.model.norm.weight)[0]
    with cached(model, shared_tokenizer(), db) as calls:
        assert torch.equal(torch.autograd.grad(model(ids).logits.sum(), model.model.norm.weight)[0], expected)
        assert calls.reasons == {"gradients": 1}
        model.requires_grad_(False)
        check_output(model(ids, logits_to_keep=1), plain(model, ids, logits_to_keep=1))
        assert calls.served_calls == 2
        model.enable_input_require_grads()
        assert model(ids).logits.requires_grad
        assert calls.reasons == {"gradients": 2}


def test_modes_of_torch_reach_the_model(db):
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            return output * 2 if func is torch.nn.functional.linear else output

    model, ids = shared_model("llama"), prompt()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = plain(model, ids).logits
    with Doubled():
        doubled = plain(model, ids).logits
    weights = dict(model.named_parameters())
    stacked = {name: torch.stack([weight, weight * 2]) for name, weight in weights.items()}

    def ensemble(weights):
        return torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits

    with torch.no_grad():
        mapped = torch.func.vmap(ensemble)(stacked)
    with cached(model, shared_tokenizer(), db) as calls:
        full = plain(model, ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(plain(model, ids).logits, rounded)
        with Doubled():
            assert torch.equal(plain(model, ids).logits, doubled)
        with FlopCounterMode(display=False) as counter:
            plain(model, ids)
        assert counter.get_total_flops() > 0
        assert calls.reasons == {"autocast": 1, "a mode of torch": 2}
        with torch.no_grad():
            assert torch.equal(torch.func.vmap(ensemble)(stacked), mapped)
        assert calls.reasons["torch.func"] == 1
        with torch.device("meta"), torch.inference_mode():  # a default device is no such mode
            torch.testing.assert_close(model(ids).logits, full, **CLOSE)
        assert calls.served_calls == 2
        # Other weights for the time of a call are other weights.
        doubled = {name: weight * 2 for name, weight in weights.items()}
        with torch.no_grad():
            got = torch.func.functional_call(model, doubled, (ids,), {"logits_to_keep": 1}).logits
            expected = torch.func.functional_call(model, doubled, (ids,), {"labels": ids}).logits
        torch.testing.assert_close(got[:, -1], expected[:, -1], **CLOSE)
        torch.testing.assert_close(plain(model, ids, logits_to_keep=1).logits[:, 0], full[:, -1], **CLOSE)


def test_weights_that_change_inside(db):
    model, ids = random_model("llama"), prompt()
    first = plain(model, ids, logits_to_keep=1)
    with cached(model, shared_tokenizer(), db) as calls:
        check_output(plain(model, ids, logits_to_keep=1), first)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
        changed = plain(model, ids, logits_to_keep=1)
        assert calls.tokens_computed == 2 * ids.shape[1]
        with torch.no_grad():
            model.model.norm.weight.div_(1.5)
        check_output(plain(model, ids, logits_to_keep=1), first)
        assert calls.tokens_computed == 2 * ids.shape[1]
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    check_output(plain(model, ids, logits_to_keep=1), changed)


def test_weights_that_are_not_finite(db):
    model, ids = random_model("gpt2"), prompt()
    with cached(model, shared_tokenizer(), db) as calls:
        model.lm_head.weight.data[5] = float("nan")
        calls.engine.invalidate()
        assert plain(model, ids, logits_to_keep=1).logits.isnan().any()
        assert calls.served_calls == 0
