"""The output layer's faster ways: right, seen by nobody, and only where all is as usual."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from conftest import shared_model, shared_tokenizer
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from promptdb import Engine, PromptDB
from promptdb import head as head_module
from promptdb.buffers import POOL
from promptdb.cache import PromptCache, layout_of
from promptdb.head import fast_output
from promptdb.watch import ModelWatch

IDS = torch.arange(40)[None] + 5


class Model:
    """What :func:`fast_output` asks of a model."""

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
        with fast_output(Model(layer), DynamicCache(), 100):
            logits = layer(other(states))
        assert torch.equal(logits, expected)
        assert logits.shape == expected.shape
    assert len(leases) == 7


@torch.no_grad()
def test_logits_that_are_kept_do_not_change():
    layer = torch.nn.Linear(64, 100_000)
    kept = []
    with fast_output(Model(layer), DynamicCache(), 30):
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
        with fast_output(Model(without), DynamicCache(), 3):
            layer(states)
    with fast_output(Model(layer), DynamicCache(), 3):
        assert layer(states).requires_grad
        assert torch.nn.Linear(64, 500)(states).requires_grad
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
        with torch.no_grad(), pytest.raises(RuntimeError):
            layer(states.double())
    monkeypatch.setattr(head_module, "_MOST_BYTES", 100)
    with torch.no_grad(), fast_output(Model(layer), DynamicCache(), 3):
        layer(states)
    assert leases == []


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "phi"])
def test_a_models_logits(arch, leases):
    model = shared_model(arch)
    watch = ModelWatch(model)
    before = watch.weights_id
    with torch.no_grad():
        expected = model(IDS).logits
        with fast_output(model, DynamicCache(), IDS.numel()):
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


class Watching(TorchFunctionMode):
    """Counts the calls of output layers among those that it sees."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.num_calls = weight, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num_calls += func is torch.nn.functional.linear and args[1] is self.weight
        return func(*args, **(kwargs or {}))


def after(model, num_tokens):
    """Return a cache of the first tokens of ``IDS``."""
    cache = PromptCache(100)
    with torch.no_grad():
        model(IDS[:, :num_tokens], past_key_values=cache)
    return cache


def depth():
    return torch._C._len_torch_function_stack()


def run(model, cache, token_ids):
    """Return in how many calls the output layer took the product the other way round, and the logits."""
    ways = []
    ordinary = head_module._linear

    def linear(states, *args, is_few):
        ways.append(is_few and states.numel() // states.shape[-1] in head_module._FEW_ROWS)
        return ordinary(states, *args, is_few=is_few)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "_linear", linear)
        with torch.no_grad(), fast_output(model, cache, token_ids.numel()):
            logits = model(token_ids, past_key_values=cache).logits
    assert depth() == 0
    assert all(layer.before_update is None for layer in cache.layers)
    return sum(ways), logits


@pytest.fixture
def few_only(monkeypatch):
    """No result is large, and no weights are too small for the other way round."""
    if not torch._C.has_mkl:
        pytest.skip("the other way round was measured with MKL only")
    monkeypatch.setattr(head_module, "_LEAST_BYTES", 48 << 20)
    monkeypatch.setattr(head_module, "_LEAST_WEIGHT_BYTES", 1)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "phi", "opt"])
def test_few_tokens_after_a_stored_prompt(arch, few_only):
    model = shared_model(arch)
    with torch.no_grad():
        expected = model(IDS).logits
    for new, is_faster in ((1, False), (6, False), (7, True), (8, True), (15, True), (16, False)):
        past = 40 - new
        found, logits = run(model, after(model, past), IDS[:, past:])
        assert bool(found) is is_faster
        torch.testing.assert_close(logits, expected[:, past:], atol=1e-5, rtol=0)
    empty = PromptCache.of_layout(layout_of(after(model, 1)), 0, 100, torch.device("cpu"))
    for cache in (PromptCache(100), empty):  # passes from the start
        found, logits = run(model, cache, IDS[:, :8])
        assert found == 0
        with torch.no_grad():
            assert torch.equal(logits, model(IDS[:, :8]).logits)


@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_are_as_exact_as_many(bias):
    layer = torch.nn.Linear(768, 5000, bias=bias)

    def worst(rows, *, is_few):
        states = torch.randn(1, rows, 768)
        exact = torch.nn.functional.linear(
            states.double(), layer.weight.double(), layer.bias.double() if bias else None
        )
        logits = head_module._linear(states, layer.weight, layer.bias, is_few=is_few)
        assert logits.shape == exact.shape
        assert logits.is_contiguous()
        return (logits - exact).abs().max().item()

    with torch.no_grad():
        many = max(worst(rows, is_few=False) for rows in (16, 17, 32, 64))
        for rows in (7, 8, 15):
            assert worst(rows, is_few=True) <= 2 * many < 1e-5


def test_small_weights_and_other_numbers_go_the_ordinary_way(monkeypatch):
    monkeypatch.setattr(head_module, "_LEAST_BYTES", 48 << 20)
    model = shared_model("llama")
    assert run(model, after(model, 20), IDS[:, 20:28])[0] == 0
    layer = torch.nn.Linear(512, 32_000)
    cache = after(model, 20)
    for dtype, is_few in ((torch.float32, torch._C.has_mkl), (torch.bfloat16, False)):
        with fast_output(Model(layer.to(dtype)), cache, 8):
            assert (cache.layers[-1].before_update is not None) is is_few


@torch.no_grad()
def test_a_bias_of_other_numbers_is_refused_as_ever():
    layer, bias = torch.nn.Linear(8, 9), torch.zeros(9, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        head_module._linear(torch.randn(1, 8, 8), layer.weight, bias, is_few=True)


def test_who_watches_sees_the_output_layer(few_only):
    model = shared_model("llama")
    cache = after(model, 20)
    with Watching(model.get_output_embeddings().weight) as watching:
        assert run_watched(model, cache, IDS[:, 20:28]) == 1
    assert watching.num_calls == 1


def run_watched(model, cache, token_ids):
    """Return how many modes there were at the end of a pass under somebody's mode."""
    with torch.no_grad(), fast_output(model, cache, token_ids.numel()):
        model(token_ids, past_key_values=cache)
        return depth()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_made_in_a_pass_is_in_none(copied, few_only):
    model = shared_model("llama")
    cache, copies = after(model, 20), []
    handle = model.model.layers[-1].register_forward_pre_hook(lambda *_: copies.append(copied(cache.layers[-1])))
    try:
        with torch.no_grad():
            expected = model(IDS[:, :28]).logits[:, 20:]
        copies.clear()
        found, logits = run(model, cache, IDS[:, 20:28])
    finally:
        handle.remove()
    assert found == 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    (layer,) = copies
    assert layer.before_update is None
    with torch.no_grad():
        layer.update(
            torch.zeros(1, *layer.keys.shape[1:2], 1, layer.keys.shape[3]), torch.zeros_like(layer.values[:, :, :1])
        )
    assert depth() == 0


def test_the_mode_comes_with_the_last_layer_and_goes_with_the_pass(few_only):
    model = shared_model("llama")
    cache = after(model, 20)
    depths = []
    handles = [layer.register_forward_hook(lambda *_: depths.append(depth())) for layer in model.model.layers]
    handles.append(model.model.layers[-1].register_forward_pre_hook(lambda *_: depths.append(-depth())))
    try:
        run(model, cache, IDS[:, 20:28])
    finally:
        for handle in handles:
            handle.remove()
    assert depths == [0] * (len(model.model.layers) - 1) + [0, 1]


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_pass_that_fails_leaves_nothing(at, few_only):
    model = shared_model("llama")
    cache = after(model, 20)

    def fail(*_):
        raise RuntimeError("failed on purpose")

    handle = model.model.layers[0 if at == "before" else -1].register_forward_hook(fail)
    try:
        with torch.no_grad(), pytest.raises(RuntimeError, match="on purpose"):  # noqa: SIM117
            with fast_output(model, cache, 8):
                model(IDS[:, 20:28], past_key_values=cache)
    finally:
        handle.remove()
    assert depth() == 0
    assert all(layer.before_update is None for layer in cache.layers)


def test_a_mode_that_the_model_itself_is_in_is_not_left_early(few_only, monkeypatch):
    model = shared_model("llama")
    cache = after(model, 20)
    forward = type(model.model).forward

    left = []

    def in_a_mode(*args, **kwargs):
        with Watching(None) as mode:
            result = forward(*args, **kwargs)
        left.append(all(torch.overrides._get_current_function_mode_stack()[at] is not mode for at in range(depth())))
        return result

    monkeypatch.setattr(type(model.model), "forward", in_a_mode)
    found, _ = run(model, cache, IDS[:, 20:28])
    assert (found, left) == (0, [True])


def test_a_layer_that_concatenates_is_as_good(few_only):
    model = shared_model("llama")
    cache = after(model, 20)
    cache.batch_repeat_interleave(1)
    with torch.no_grad():
        expected = model(IDS[:, :28]).logits[:, 20:]
    _, logits = run(model, cache, IDS[:, 20:28])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
