"""Logits in memory that is used again: the same bits, owned by whoever holds them, and only where all is as usual."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import shared_model, shared_tokenizer

from promptdb import Engine, PromptDB
from promptdb import head as head_module
from promptdb.buffers import POOL
from promptdb.head import pooled_logits
from promptdb.identity import weights_id

IDS = torch.arange(40)[None] + 5


class Model:
    """What :func:`pooled_logits` asks of a model."""

    def __init__(self, layer):
        self.layer = layer

    def get_output_embeddings(self):
        return self.layer


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(head_module, "_LEAST_BYTES", 1)


@pytest.fixture
def leases(monkeypatch):
    sizes = []
    lease = POOL.lease
    monkeypatch.setattr(POOL, "lease", lambda size_bytes: (sizes.append(size_bytes), lease(size_bytes))[1])
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "hidden"), [(5000, 64), (1003, 257)])
@torch.no_grad()
def test_the_same_bits(dtype, bias, width, hidden, leases):
    layer = torch.nn.Linear(hidden, width, bias=bias).to(dtype)
    for shape in ((1, 1), (1, 3), (1, 64), (1, 513), (3, 17), (1, 2, 2), ()):
        states = torch.randn(*shape, hidden).to(dtype)
        expected = layer(states)
        with pooled_logits(Model(layer)):
            logits = layer(states)
        assert torch.equal(logits, expected)
        assert logits.shape == expected.shape
    assert len(leases) == 7
    assert "forward" not in vars(layer)


@torch.no_grad()
def test_logits_that_are_kept_do_not_change():
    layer = torch.nn.Linear(64, 100_000)
    kept = []
    with pooled_logits(Model(layer)):
        for _ in range(6):
            states = torch.randn(1, 30, 64)
            logits = layer(states)
            kept.append((logits[0, -1], layer.weight @ states[0, -1] + layer.bias))
            del logits
    for row, expected in kept:
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_anything_unusual_goes_the_ordinary_way(leases, monkeypatch):
    layer = torch.nn.Linear(64, 500)
    states = torch.randn(1, 3, 64)

    class Own(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    own = Own(64, 500)
    with torch.no_grad(), pooled_logits(Model(own)):
        torch.testing.assert_close(own(states), states @ own.weight.T + own.bias + 1)
    with torch.no_grad(), pooled_logits(Model(None)):
        pass
    patched = torch.nn.Linear(64, 500)
    patched.forward = lambda x: x
    with torch.no_grad(), pooled_logits(Model(patched)):
        assert patched(states) is states
    assert "forward" in vars(patched)
    with pooled_logits(Model(layer)):
        assert layer(states).requires_grad
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
        with torch.no_grad(), pytest.raises(RuntimeError):
            layer(states.double())
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", lambda self, x: x)
        with pooled_logits(Model(layer)):
            assert layer(states) is states
    monkeypatch.setattr(head_module, "_MOST_BYTES", 100)
    with torch.no_grad(), pooled_logits(Model(layer)):
        layer(states)
    assert leases == []


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "phi"])
def test_a_models_logits(arch):
    model = shared_model(arch)
    with torch.no_grad():
        expected = model(IDS).logits
        with pooled_logits(model):
            found = model(IDS).logits
            twin = copy.deepcopy(model)
            assert weights_id(model)  # another thread may ask for it during a pass
        assert torch.equal(found, expected)
        assert torch.equal(twin(IDS).logits, expected)
    twin_head = twin.get_output_embeddings()
    with torch.no_grad():
        twin_head.weight.zero_()
        assert float(twin(IDS).logits.abs().max()) < float(expected.abs().max())
    assert torch.equal(model(IDS).logits, expected)


def test_engines_of_two_threads_share_a_model():
    model, results = shared_model("llama"), {}
    prompts = [[number, *range(10, 40)] for number in range(12)]

    def work(name):
        with PromptDB.in_memory() as db, Engine(db, model, shared_tokenizer()) as engine:
            results[name] = [engine.get(prompt).logits for prompt in prompts]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            expected = model(torch.tensor([prompt])).logits[0, -1]
            for found in results.values():
                torch.testing.assert_close(found[number], expected, atol=1e-5, rtol=0)
    assert "forward" not in vars(model.get_output_embeddings())
