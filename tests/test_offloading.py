"""Offloaded models: the same results and the same identity as the plain model, or a refusal."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import SUPPORTED, TEXT, shared_model, shared_tokenizer

from promptdb import Engine, Recorder
from promptdb.demo_models import random_model
from promptdb.errors import IdentityError, ModelPlacementError, StoreError
from promptdb.hook_points import HookVariableNames as N
from promptdb.hooks import Hook, PrecomputeContext, hooked
from promptdb.identity import weights_id
from promptdb.interventions import Intervention
from promptdb.offloading import offload
from promptdb.watch import ModelWatch

IDS = list(TEXT.encode()[:70])


def twin(arch="llama", **options):
    """Return a copy of a shared model, which is offloaded, and the plain one."""
    plain = shared_model(arch)
    return offload(copy.deepcopy(plain), "cpu", **options), plain


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    ("arch", "where"), [*((arch, "memory") for arch in SUPPORTED), ("gpt2", "files"), ("phi", "files")]
)
def test_results_and_identity_are_the_plain_models(arch, where, tmp_path):
    model, plain = twin(arch, folder=None if where == "memory" else tmp_path / "weights")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert weights_id(model) == weights_id(plain)
    assert torch.equal(logits(model), logits(plain))
    assert weights_id(model) == weights_id(plain)
    remove_hook_from_module(model, recurse=True)
    assert weights_id(model) == weights_id(plain)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_files(dtype, tmp_path):
    plain = random_model("llama").to(dtype)
    model = offload(copy.deepcopy(plain), "cpu", folder=tmp_path / "weights")
    assert weights_id(model) == weights_id(plain)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("order", ["plain first", "offloaded first"])
def test_stored_spans_are_hits_for_both(db, order):
    pair = twin()
    first, second = pair if order == "offloaded first" else reversed(pair)
    with Engine(db, first, shared_tokenizer()) as engine:
        stored = engine.get(IDS)
        assert stored.tokens_computed == len(IDS)
    with Engine(db, second, shared_tokenizer()) as engine:
        found = engine.get(IDS)
        assert (found.tokens_loaded, found.tokens_computed) == (len(IDS), 0)
        assert torch.equal(found.logits, stored.logits)
        longer = engine.get([*IDS, 1, 2, 3])
        assert longer.tokens_loaded >= len(IDS) - 1
        assert torch.allclose(longer.logits, logits(shared_model("llama"), [*IDS, 1, 2, 3])[-1], atol=1e-5)
        again = engine.run([[*IDS, at] for at in range(4)])
        for at, each in enumerate(again):
            assert torch.allclose(each.logits, logits(shared_model("llama"), [*IDS, at])[-1], atol=1e-5)


def test_hooks_recorders_and_interventions_work_on_it(db):
    model, plain = twin("gpt2")
    double = [Hook(N.POST_MLP, lambda x, pctx: x * 1.5, layers=0), Hook(N.ATTN_PROBS, lambda x, pctx: x * 0.5)]
    results = []
    for each in (model, plain):
        kept = []
        reader = Hook(N.KEY_STATES, lambda x, pctx, kept=kept: kept.append(x.clone()))
        pctx = PrecomputeContext(each.config, [*double, reader])
        with torch.no_grad():
            results.append((hooked(each)(torch.tensor([IDS]), pctx=pctx).logits, torch.stack(kept)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0][0], logits(plain))
    rows = []
    for each in (model, plain):
        steer = Intervention("steer", double[:1])
        with Engine(db, each, shared_tokenizer(), intervention=steer) as engine:
            (recording,) = Recorder(engine, [N.PRE_MLP]).run([IDS])
            rows.append(recording.tensor(N.PRE_MLP, 1).clone())
            assert recording.tokens_computed == (len(IDS) if each is model else 0)
    assert torch.equal(*rows)


def test_changed_weights_are_another_model(tmp_path):
    model, plain = twin()
    watch = ModelWatch(model)
    before = watch.weights_id
    assert before == weights_id(plain)
    logits(model)
    assert watch.weights_id == before
    weights = model.lm_head._hf_hook.weights_map
    weights["weight"].mul_(1.01)
    assert watch.weights_id != before
    assert watch.weights_id == weights_id(model)
    changed = copy.deepcopy(plain)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.01)
    assert watch.weights_id == weights_id(changed)
    # replaced in the hooks' map, with no pass in between
    weights.dataset["lm_head.weight"] = plain.lm_head.weight.detach().clone()
    assert watch.weights_id == before
    model.lm_head._hf_hook.weights_map = {"weight": plain.lm_head.weight.detach() * 2}
    assert watch.weights_id not in (before, weights_id(changed))


def test_changed_files_are_another_model(tmp_path):
    model, _ = twin(folder=tmp_path / "weights")
    watch = ModelWatch(model)
    before = watch.weights_id
    path = tmp_path / "weights" / "lm_head.weight.dat"
    content = bytearray(path.read_bytes())
    content[:64] = bytes(64)
    with path.open("r+b") as stream:
        stream.write(content)
    assert watch.weights_id != before


def test_a_pass_does_not_read_all_weights_for_the_identity_again(db, monkeypatch):
    from promptdb import watch

    model, _ = twin()
    with Engine(db, model, shared_tokenizer()) as engine:
        hashed = []
        monkeypatch.setattr(watch, "weights_id", lambda model: hashed.append(1) or weights_id(model))
        engine.get(IDS)
        engine.get([5, *IDS])
        assert hashed == []


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 2


def test_what_cannot_be_identified_is_refused(db, tmp_path):
    plain = shared_model("llama")
    from_disk = accelerate.disk_offload(copy.deepcopy(plain), tmp_path / "disk", torch.device("cpu"))
    with pytest.raises(IdentityError, match="read from a file each time"):
        weights_id(from_disk)
    with pytest.raises(IdentityError, match="read from a file each time"):
        Engine(db, from_disk, shared_tokenizer())
    model, _ = twin()
    with pytest.raises(ModelPlacementError, match="hooks of accelerate's already"):
        offload(model, "cpu")
    hook = model.lm_head._hf_hook
    other = dict(plain.state_dict())
    hook.weights_map = {"weight": other["lm_head.weight"].half()}
    with pytest.raises(IdentityError, match="runs as another"):
        weights_id(model)
    hook.weights_map = {}
    with pytest.raises(IdentityError, match="cannot be read"):
        weights_id(model)
    changing = copy.deepcopy(plain)
    add_hook_to_module(
        changing.lm_head, accelerate.hooks.SequentialHook(accelerate.hooks.AlignDevicesHook(), Doubling())
    )
    with pytest.raises(IdentityError, match="patched"):
        weights_id(changing)
    cast = copy.deepcopy(plain)
    accelerate.big_modeling.attach_layerwise_casting_hooks(cast, torch.float16, torch.float32)
    with pytest.raises(IdentityError, match="patched"):
        weights_id(cast)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        offload(copy.deepcopy(plain), "cpu", folder=tmp_path / "full")
    with pytest.raises(ModelPlacementError, match="meta"):
        offload(copy.deepcopy(plain).to("meta"), "cpu")


def test_cpu_offload_itself_is_identified():
    plain = shared_model("opt")
    model = accelerate.cpu_offload(copy.deepcopy(plain), torch.device("cpu"))
    assert weights_id(model) == weights_id(plain)
    with_buffers = accelerate.cpu_offload(copy.deepcopy(plain), torch.device("cpu"), offload_buffers=True)
    assert weights_id(with_buffers) == weights_id(plain)
    dispatched = copy.deepcopy(plain)
    names = {name for name, _ in plain.named_children()}
    accelerate.dispatch_model(dispatched, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    assert weights_id(dispatched) == weights_id(plain)
