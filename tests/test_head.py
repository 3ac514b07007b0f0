"""Logits in memory that is used again: the same bits, owned by whoever holds them, and only where all is as usual."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import shared_model, shared_tokenizer

from promptdb import Engine, PromptDB
from promptdb import head as head_module
from promptdb.buffers import POOL
from promptdb.head import pooled_logits
from promptdb.watch import ModelWatch

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
    other = torch.nn.Linear(hidden, hidden).to(dtype)
    for shape in ((1, 1), (1, 3), (1, 64), (1, 513), (3, 17), (1, 2, 2), ()):
        states = torch.randn(*shape, hidden).to(dtype)
        expected = layer(other(states))
        with pooled_logits(Model(layer), 100):
            logits = layer(other(states))
        assert torch.equal(logits, expected)
        assert logits.shape == expected.shape
    assert len(leases) == 7


@torch.no_grad()
def test_logits_that_are_kept_do_not_change():
    layer = torch.nn.Linear(64, 100_000)
    kept = []
    with pooled_logits(Model(layer), 30):
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
    for without in (None, torch.nn.Identity(), torch.nn.Embedding(3, 4, device="meta")):
        with pooled_logits(Model(without), 3):
            layer(states)
    with pooled_logits(Model(layer), 3):
        assert layer(states).requires_grad
        assert torch.nn.Linear(64, 500)(states).requires_grad
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
        with torch.no_grad(), pytest.raises(RuntimeError):
            layer(states.double())
    monkeypatch.setattr(head_module, "_MOST_BYTES", 100)
    with torch.no_grad(), pooled_logits(Model(layer), 3):
        layer(states)
    assert leases == []


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "phi"])
def test_a_models_logits(arch, leases):
    model = shared_model(arch)
    watch = ModelWatch(model)
    before = watch.weights_id
    with torch.no_grad():
        expected = model(IDS).logits
        with pooled_logits(model, IDS.numel()):
            found = model(IDS).logits
            assert watch._seen.unchanged()  # another thread may ask in the middle of a pass
        assert torch.equal(found, expected)
    assert len(leases) == 1
    assert watch.weights_id == before


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
