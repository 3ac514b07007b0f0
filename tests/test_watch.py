from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch

import promptdb.watch
from promptdb.demo_models import random_model
from promptdb.errors import IdentityError
from promptdb.identity import weights_id
from promptdb.refusals import IDENTIFIED
from promptdb.watch import ModelWatch


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The IDs of all full hashes that watches made."""
    made: list[str] = []

    def counted(model: Any) -> str:
        made.append(weights_id(model))
        return made[-1]

    monkeypatch.setattr(promptdb.watch, "weights_id", counted)
    return made


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_hashes_once_while_nothing_changes(arch: str, hashes: list[str]) -> None:
    model = random_model(arch)
    watch = ModelWatch(model)
    ids = torch.arange(5, 25)[None]
    seen = set()
    for _ in range(3):
        seen.add(watch.weights_id)
        with torch.no_grad():
            model(ids, use_cache=True)
            model(ids, output_hidden_states=True)  # leaves hooks of transformers' own behind
            model.generate(ids, max_new_tokens=2, do_sample=False)
        model.requires_grad_(False)
        model.name_or_path = "elsewhere"
        model.train().eval()
    assert seen == {weights_id(model)}
    assert len(hashes) == 1


def optimiser_step(model: Any) -> None:
    model(torch.arange(5, 15)[None]).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def assign(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data * 2


def new_norm(model: Any) -> None:
    model.model.norm = torch.nn.RMSNorm(64)


def theta(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 5.0


def new_config_then_edit(model: Any) -> None:
    import copy

    attention = model.model.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config.rms_norm_eps = 0.5


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimiser": optimiser_step,
    "data": lambda m: m.lm_head.weight.data.mul_(1.5),
    "data of a vector": lambda m: m.model.norm.weight.data.add_(1),
    "data transposed": lambda m: m.model.layers[0].mlp.up_proj.weight.data.t().mul_(1.5),
    "assigned data": assign,
    "new parameter": lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight * 2)),
    "bf16": lambda m: m.to(torch.bfloat16),
    "one element": lambda m: m.lm_head.weight.detach()[7, 7].add_(1),
    "buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "config": lambda m: setattr(m.config, "rms_norm_eps", 0.5),
    "config nested": theta,
    "config replaced": new_config_then_edit,
    "attribute": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.5),
    "attribute added": lambda m: setattr(m.model, "extra", 1),
    "attribute removed": lambda m: delattr(m.model.layers[0].self_attn, "attention_dropout"),
    "module": new_norm,
    "module removed": lambda m: m.model.layers.pop(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_is_noticed(change: Callable[[Any], Any]) -> None:
    model = random_model("llama")
    watch = ModelWatch(model)
    known = watch.weights_id
    change(model)
    now = watch.weights_id
    assert now == weights_id(model) != known
    assert watch.weights_id == now


def test_not_contiguous_and_not_a_number() -> None:
    model = random_model("llama")
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    model.model.norm.weight.data[3] = float("nan")
    watch = ModelWatch(model)
    known = watch.weights_id
    assert watch.weights_id == known
    assert watch._seen is not None
    assert watch._seen.unchanged()
    weight.data.mul_(1.5)
    assert watch.weights_id != known


REFUSED: dict[str, Callable[[Any], Any]] = {
    "hook": lambda m: m.model.layers[1].register_forward_hook(lambda *_: None),
    "pre-hook": lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None),
    "forward": lambda m: setattr(m.lm_head, "forward", MethodType(lambda self, x: x, m.lm_head)),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_identified_is_refused_at_once(change: Callable[[Any], Any]) -> None:
    model = random_model("llama")
    watch = ModelWatch(model)
    known = watch.weights_id
    handle = change(model)
    for _ in range(2):
        with pytest.raises(IdentityError):
            _ = watch.weights_id
    with pytest.raises(IdentityError):
        ModelWatch(model, known_id=known)
    if handle is None:
        del model.lm_head.forward
    else:
        handle.remove()
    assert watch.weights_id == known


def test_global_hook_is_noticed() -> None:
    watch = ModelWatch(random_model("llama"))
    known = watch.weights_id
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        with pytest.raises(IdentityError, match="global"):
            _ = watch.weights_id
    finally:
        handle.remove()
    assert watch.weights_id == known


def test_class_patched_for_all_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    watch = ModelWatch(model)
    known = watch.weights_id

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    monkeypatch.setattr(type(model.model.norm), "forward", forward)
    assert watch.weights_id != known


def test_known_id_is_believed_until_something_changes(hashes: list[str]) -> None:
    model = random_model("llama")
    watch = ModelWatch(model, known_id="ab" * 32)
    assert watch.weights_id == "ab" * 32
    assert hashes == []
    model.lm_head.weight.data.mul_(2)
    assert watch.weights_id == weights_id(model)
    assert len(hashes) == 1


def test_limit_and_invalidate(hashes: list[str]) -> None:
    model = random_model("llama")
    watch = ModelWatch(model)
    known = watch.weights_id
    model.lm_head.weight.data[5, 33] += 1  # one element past every check: the documented limit
    assert watch.weights_id == known
    watch.invalidate()
    assert watch.weights_id == weights_id(model) != known
    assert len(hashes) == 2


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        random_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    watch = ModelWatch(model)
    on = watch.weights_id
    with model.disable_adapter():
        assert watch.weights_id != on
    assert watch.weights_id == on
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.scaling["default"] *= 2
    assert watch.weights_id != on
    layer.scaling["default"] /= 2
    assert watch.weights_id == on
    model.merge_adapter()
    assert watch.weights_id == weights_id(model) != on


def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = random_model("llama")
    watch = ModelWatch(model)
    known = watch.weights_id
    assert watch.weights_id == known == weights_id(random_model("llama"))
    with torch.inference_mode():
        model.lm_head.weight.mul_(2)
    assert watch.weights_id != known


def test_many_threads(hashes: list[str]) -> None:
    watch = ModelWatch(random_model("llama"))
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(watch.weights_id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == len(hashes) == 1


def test_owner_may_still_resize_storage() -> None:
    model = random_model("llama")
    _ = ModelWatch(model).weights_id
    assert model.lm_head.weight.untyped_storage().resizable()


def test_other_threads_attach_hooks_and_take_them_off() -> None:
    """Engines of several threads share a model, and the hooks of one pass come and go while another one looks."""
    model = random_model("gpt2")
    expected, stop = weights_id(model), threading.Event()

    def hook(module: Any, args: Any, output: Any) -> None:
        return None

    setattr(hook, IDENTIFIED, True)

    def work() -> None:
        while not stop.is_set():
            handles = [module.register_forward_hook(hook) for module in model.modules()]
            for handle in handles:
                handle.remove()

    thread, interval_s = threading.Thread(target=work), sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1e-4)  # threads take turns fifty times as often, so few tries meet what they should
    try:
        for _ in range(40):
            assert ModelWatch(model, known_id=expected).weights_id == expected
    finally:
        sys.setswitchinterval(interval_s)
        stop.set()
        thread.join()
