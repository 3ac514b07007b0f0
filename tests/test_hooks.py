"""Hooks against plain transformers: places, shapes, exactness, caches, gradients, filters, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import shared_model
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.cache_utils import DynamicCache

from promptdb.demo_models import random_model
from promptdb.errors import InputTypeError, ModelError, UnsupportedModelError
from promptdb.hook_points import POINTS
from promptdb.hooks import Hook, HookVariableNames, PrecomputeContext, hooked, supported_architectures

N = HookVariableNames
ALL = N.ALL_VARIABLE_NAMES
SCORES = (N.PRE_MASK_ATTN_WEIGHTS, N.POST_MASK_ATTN_WEIGHTS, N.ATTN_PROBS)
ARCHITECTURES = (
    "opt", "gpt_neox", "gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "olmo2",
    "qwen3_moe",
)  # fmt: skip
# What an architecture does not have, and why: nothing else may be refused.
MISSING = {
    "gpt_neox": {N.POST_ATTN: "together"},
    "phi": {N.POST_ATTN: "together"},
    "qwen3_moe": {N.POST_FC1: "experts", N.POST_ACT: "experts"},
}
# The last projection of the MLP, and what is done to its result before it is added.
DOWN = {
    "opt": ("fc2", None), "gpt_neox": ("mlp.dense_4h_to_h", None), "gpt2": ("mlp.c_proj", None),
    "phi": ("mlp.fc2", None), "gemma2": ("mlp.down_proj", "post_feedforward_layernorm"),
    "gemma3_text": ("mlp.down_proj", "post_feedforward_layernorm"),
    "olmo2": ("mlp.down_proj", "post_feedforward_layernorm"),
}  # fmt: skip
LAYERS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}

IDS = torch.tensor([[5, 17, 300, 42, 9, 8, 7, 6, 77, 78, 79, 80, 81, 3, 2, 11, 12, 13, 14, 15, 16]])  # > a window of 16


def eager(arch):
    model = copy.deepcopy(shared_model(arch))
    model.set_attn_implementation("eager")
    return model


def points(arch):
    return [name for name in ALL if name not in MISSING.get(arch, ())]


class Seen:
    """Hooks on points, which keep what they are shown."""

    def __init__(self, names, change=lambda x: None):
        self.values = {}
        self.hooks = [Hook(name, self._keeper(name, change)) for name in names]

    def _keeper(self, name, change):
        def keep(x, pctx):
            self.values.setdefault((name, pctx.context.get("layer")), []).append(x.detach().clone())
            return change(x)

        return keep

    def __getitem__(self, where):
        (value,) = self.values[where if isinstance(where, tuple) else (where, None)]
        return value


def run(model, hooks, ids=IDS, **options):
    with torch.no_grad():
        return hooked(model)(ids, pctx=PrecomputeContext(model.config, hooks), **options)


def layer_of(model, arch, number):
    return model.get_submodule(f"{LAYERS.get(arch, 'model.layers')}.{number}")


def left_behind(model):
    """Return whether a hook of ours is still there; transformers leaves some of its own after output_hidden_states."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(hook.__module__.startswith("promptdb") for hook in hooks)


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=0)


def test_the_table_has_the_architectures_of_the_documentation():
    assert sorted(supported_architectures()) == sorted(ARCHITECTURES)
    assert len(ALL) == len(set(ALL)) == len(POINTS) == 20


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_point_fires_once_with_its_shape_and_changes_nothing(arch):
    model = eager(arch)
    plain = model(IDS, labels=IDS)
    seen = Seen(points(arch), change=lambda x: x)
    out = run(model, seen.hooks, labels=IDS)
    assert torch.equal(out.logits, plain.logits)
    assert out.loss == plain.loss
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {"b": 1, "n": IDS.shape[1], "N": IDS.shape[1], "n-1": IDS.shape[1] - 1, "d": 64, "f": 128, "v": 512}
    sizes |= {"h": heads, "c": size}
    for name in points(arch):
        point = POINTS[name]
        for layer in range(2) if point.by_layer else [None]:
            states = name in (N.KEY_STATES, N.VALUE_STATES)
            known = sizes | ({"h": getattr(config, "num_key_value_heads", heads)} if states else {})
            assert seen[name, layer].shape == tuple(known[letter] for letter in point.shape.split()), (name, layer)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_points_are_where_their_names_say(arch):
    model = eager(arch)
    seen = Seen(points(arch))
    out = run(model, seen.hooks, labels=IDS)
    plain = model(IDS, output_hidden_states=True, output_attentions=True)
    states = plain.hidden_states
    assert torch.equal(seen[N.POST_POS_EMBEDDINGS], states[0])
    assert torch.equal(seen[N.POST_TOK_EMBEDDINGS], model.get_input_embeddings()(IDS))
    assert torch.equal(seen[N.POST_MLP, 0], states[1])
    assert torch.equal(seen[N.POST_FINAL_LAYER_NORM], states[-1])
    assert torch.equal(seen[N.LOGITS], out.logits)
    losses = torch.nn.functional.cross_entropy(out.logits[0, :-1], IDS[0, 1:], reduction="none")
    assert close(seen[N.UNREDUCED_LOSS][0], losses)
    down, norm = DOWN.get(arch, ("mlp.down_proj", None))
    for number in range(2):
        layer = layer_of(model, arch, number)
        probs, before = seen[N.ATTN_PROBS, number], seen[N.PRE_MASK_ATTN_WEIGHTS, number]
        assert torch.equal(probs, plain.attentions[number])
        assert close(seen[N.POST_MASK_ATTN_WEIGHTS, number].softmax(-1), probs)
        visible = probs[0, 0] > 0
        assert not visible.triu(1).any()
        assert torch.equal(before[..., visible], seen[N.POST_MASK_ATTN_WEIGHTS, number][..., visible])
        values = seen[N.VALUE_STATES, number].repeat_interleave(
            probs.shape[1] // seen[N.VALUE_STATES, number].shape[1], 1
        )
        assert close(probs @ values, seen[N.ATTN_WEIGHTED_VALUES, number])
        keys = seen[N.KEY_STATES, number].repeat_interleave(probs.shape[1] // seen[N.KEY_STATES, number].shape[1], 1)
        raw = seen[N.QUERY_STATES, number] @ keys.transpose(-1, -2)
        attention = next(m for m in layer.modules() if hasattr(m, "scaling"))
        scores = raw * (1.0 if arch == "opt" else attention.scaling)  # OPT scales its queries
        cap = getattr(attention, "attn_logit_softcapping", None)
        assert close(torch.tanh(scores / cap) * cap if cap else scores, before)
        added = seen[N.ATTN_RESIDUAL, number] + seen[N.MLP_RESIDUAL, number]
        block_in = seen[N.POST_MLP, number - 1] if number else seen[N.POST_POS_EMBEDDINGS]
        assert close(block_in + added, seen[N.POST_MLP, number])
        if N.POST_ATTN in points(arch):
            assert close(block_in + seen[N.ATTN_RESIDUAL, number], seen[N.POST_ATTN, number])
        if N.POST_ACT in points(arch):
            result = layer.get_submodule(down)(seen[N.POST_ACT, number])
            result = layer.get_submodule(norm)(result) if norm else result
            assert close(result, seen[N.MLP_RESIDUAL, number])
            first = getattr(getattr(layer, "mlp", layer), "act_fn", None) or getattr(layer, "activation_fn", None)
            if first is not None and not hasattr(getattr(layer, "mlp", None), "up_proj"):
                assert close(first(seen[N.POST_FC1, number]), seen[N.POST_ACT, number])
        assert not torch.equal(seen[N.PRE_MLP, number], seen[N.MLP_RESIDUAL, number])


def _add_ramp(x, pctx):
    return x + torch.linspace(1, 2, x.shape[-1])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adding_something_changes_the_logits_or_the_loss(arch):
    model = eager(arch)
    with torch.no_grad():
        plain = model(IDS, labels=IDS)
    for name in points(arch):
        # Not the same number everywhere: LayerNorm takes that off again, and softmax what is added to all keys.
        change = (lambda x, pctx: x * 1.5) if name == N.KEY_STATES else _add_ramp
        out = run(model, [Hook(name, change)], labels=IDS)
        if name == N.UNREDUCED_LOSS:
            assert out.loss > plain.loss + 1
        else:
            assert not close(out.logits, plain.logits), name
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain.logits)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_an_architecture_does_not_have_is_refused_with_the_reason(arch):
    model = shared_model(arch)
    for name, reason in MISSING.get(arch, {}).items():
        with pytest.raises(UnsupportedModelError, match=reason):
            run(model, [Hook(name, lambda x, pctx: None)])
    assert model(IDS).logits.shape == (1, IDS.shape[1], 512)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_states_are_read_and_changed_under_fast_attention(arch):
    model = shared_model(arch)
    names = [name for name in points(arch) if name not in SCORES]
    plain = model(IDS, labels=IDS)
    before = model.config._attn_implementation
    seen = Seen(names, change=lambda x: x)
    assert torch.equal(run(model, seen.hooks, labels=IDS).logits, plain.logits)
    assert model.config._attn_implementation == before
    out = run(model, [Hook(N.ATTN_WEIGHTED_VALUES, lambda x, pctx: torch.zeros_like(x), layers=1)])
    seen = Seen([N.ATTN_WEIGHTED_VALUES])
    run(model, [Hook(N.ATTN_WEIGHTED_VALUES, lambda x, pctx: x * 0, layers=1), *seen.hooks])
    assert not close(out.logits, plain.logits)
    assert not seen[N.ATTN_WEIGHTED_VALUES, 1].any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_changed_keys_and_values_reach_the_cache(arch):
    model = shared_model(arch)
    out = run(model, [Hook(N.KEY_STATES, lambda x, p: x * 2), Hook(N.VALUE_STATES, lambda x, p: x - 3)], use_cache=True)
    plain = model(IDS, use_cache=True)
    first, own = out.past_key_values.layers[0], plain.past_key_values.layers[0]
    # Those of the first layer depend on the embeddings only.
    assert close(first.keys, own.keys * 2)
    assert close(first.values, own.values - 3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_with_a_past_the_points_are_rows_of_one_pass(arch):
    model = eager(arch)
    names = [name for name in points(arch) if name != N.UNREDUCED_LOSS]
    whole = Seen(names)
    run(model, whole.hooks)
    # A cache without the configuration keeps all tokens of every layer.
    cache, rest = DynamicCache(), Seen(names)
    with torch.no_grad():
        model(IDS[:, :13], past_key_values=cache, use_cache=True)
    run(model, rest.hooks, IDS[:, 13:], past_key_values=cache, use_cache=True)
    for where in whole.values:
        dim = POINTS[where[0]].token_dim
        expected = whole[where]
        if where[0] not in (N.KEY_STATES, N.VALUE_STATES):
            expected = expected.narrow(dim, 13, IDS.shape[1] - 13)
        if where[0] == N.POST_MASK_ATTN_WEIGHTS:
            continue  # what is masked may be written as another large number
        assert close(rest[where], expected), where


def test_hooks_compose_in_order_and_none_means_unchanged():
    model = shared_model("gpt2")
    seen = []
    hooks = [
        Hook(N.POST_MLP, lambda x, p: x * 2, layers=0),
        Hook(N.POST_MLP, lambda x, p: None),
        Hook(N.POST_MLP, lambda x, p: x + 1, layers=0),
        Hook(N.POST_MLP, lambda x, p: seen.append(x), layers=0),
    ]
    run(model, hooks)
    plain = model(IDS, output_hidden_states=True).hidden_states[1]
    assert torch.equal(seen[0], plain * 2 + 1)


@pytest.mark.parametrize("positions", [3, (0, -1), slice(-4, None), range(2, 9, 3)])
def test_positions_see_their_rows_only(positions):
    model = shared_model("llama")
    count = IDS.shape[1]
    wanted = list(range(count))[positions] if isinstance(positions, slice) else positions
    wanted = sorted({at % count for at in ([wanted] if isinstance(wanted, int) else wanted)})
    seen = []
    hook = Hook(N.POST_MLP, lambda x, p: seen.append(x.clone()) or x * 0, layers=0, positions=positions)
    after = Seen([N.POST_MLP])
    run(model, [hook, *after.hooks])
    states = model(IDS, output_hidden_states=True).hidden_states[1]
    assert torch.equal(seen[0], states[:, wanted])
    expected = states.clone()
    expected[:, wanted] = 0
    assert torch.equal(after[N.POST_MLP, 0], expected)


def test_positions_count_tokens_in_the_cache():
    model = shared_model("llama")
    calls = []
    hook = Hook(N.POST_MLP, lambda x, p: calls.append(x.shape[1]), layers=1, positions=[3, 14])
    keys = Hook(N.KEY_STATES, lambda x, p: calls.append(x.shape[2]), layers=1, positions=[3, 14])
    cache = DynamicCache()
    run(model, [hook], IDS[:, :13], past_key_values=cache, use_cache=True)
    run(model, [hook, keys], IDS[:, 13:], past_key_values=cache, use_cache=True)
    assert calls == [1, 2, 1]
    calls.clear()
    run(model, [hook], IDS[:, :3])
    assert calls == []


def test_layers_and_names_of_other_libraries():
    model = shared_model("gpt2")
    names = {
        "blocks.1.hook_resid_post": (N.POST_MLP, 1),
        "blocks.1.hook_resid_pre": (N.POST_MLP, 0),
        "blocks.0.hook_resid_mid": (N.POST_ATTN, 0),
        "blocks.1.attn.hook_pattern": (N.ATTN_PROBS, 1),
        "transformer.h.1.mlp": (N.MLP_RESIDUAL, 1),
    }
    seen, values = Seen(ALL), {}

    def keep(name):
        return lambda x, p: values.__setitem__(name, (x, p.context["layer"]))

    run(model, [*(Hook(name, keep(name)) for name in names), *seen.hooks], labels=IDS)
    for name, where in names.items():
        assert torch.equal(values[name][0], seen[where]), name
        assert values[name][1] == where[1]
    last = []
    run(model, [Hook(N.POST_MLP, lambda x, p: last.append(p.context["layer"]), layers=-1)])
    assert last == [1]


def test_any_model_takes_hooks_on_module_paths():
    model = shared_model("falcon")
    plain = model(IDS).logits
    out = run(model, [Hook("transformer.h.1.mlp", lambda x, p: x * 0)])
    assert not close(out.logits, plain)
    with pytest.raises(UnsupportedModelError, match="falcon"):
        run(model, [Hook(N.POST_MLP, lambda x, p: None)])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda f: Hook("post-mlpp", f), "no point"),
        (lambda f: Hook("", f), "name"),
        (lambda f: Hook(3, f), "name"),
        (lambda f: Hook("blocks.1.attn.hook_q", f), "no point"),
        (lambda f: Hook(N.POST_MLP, None), "function"),
        (lambda f: Hook(N.POST_MLP, f, layers="all"), "integers"),
        (lambda f: Hook(N.POST_MLP, f, positions=1.5), "integers"),
        (lambda f: Hook(N.LOGITS, f, layers=0), "whatever the layer"),
        (lambda f: Hook(N.POST_MLP, f, layers=2), "the model has 2"),
        (lambda f: Hook(N.POST_MLP, f, layers=-3), "the model has 2"),
        (lambda f: Hook("transformer.h.7.mlp", f), "no module"),
        (lambda f: Hook(N.POST_MLP, lambda x, p: 3), "returned a int"),
        (lambda f: Hook(N.POST_MLP, lambda x, p: x[:, :1]), "returned"),
    ],
)
def test_wrong_hooks_are_refused_and_leave_nothing_behind(make, reason):
    model = shared_model("gpt2")
    with pytest.raises(InputTypeError, match=reason):
        run(model, [make(lambda x, p: None)])
    assert not left_behind(model)


def test_an_error_in_a_hook_leaves_the_model_as_it_was():
    model = shared_model("llama")
    before, own = model(IDS).logits, model.config._attn_implementation

    def fail(x, pctx):
        raise RuntimeError("on purpose")

    for name in ALL[:-1]:
        with pytest.raises(RuntimeError, match="on purpose"):
            run(model, [Hook(name, fail), Hook(N.ATTN_PROBS, lambda x, p: x)])
        assert model.config._attn_implementation == own
        assert torch.equal(model(IDS).logits, before), name
    assert not left_behind(model)


def test_handles_and_contexts_remove_hooks():
    model = hooked(shared_model("gpt2"))
    pctx = PrecomputeContext(model.config)
    calls = []

    def stopped():
        with pctx.add_hooks([Hook(N.POST_MLP, lambda x, p: calls.append(1))]):
            model(IDS, pctx=pctx)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    assert pctx.hooks == []
    assert len(calls) == 2
    handle = pctx.add_hooks([Hook(N.POST_MLP, lambda x, p: calls.append(1))])
    handle.remove()
    handle.remove()
    model(IDS, pctx=pctx)
    assert len(calls) == 2
    with model.attach([Hook(N.POST_MLP, lambda x, p: calls.append(1))]) as attached:
        model.unhooked(IDS)
        with pytest.raises(ModelError, match="another context"), model.attach([]):
            pass
        attached.remove()
        model.unhooked(IDS)
    assert len(calls) == 4


def test_generate_runs_under_hooks():
    model = hooked(shared_model("gpt2"))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    plain = model.generate(IDS, attention_mask=mask, **options)
    lengths = []
    look = [Hook(N.KEY_STATES, lambda x, p: lengths.append(x.shape[2]), layers=0)]
    pctx = PrecomputeContext(model.config, look)
    assert torch.equal(model.generate(IDS, attention_mask=mask, pctx=pctx, **options), plain)
    assert lengths == [21, 22, 23, 24]

    def only(x, pctx):
        return torch.full_like(x, -100.0).index_fill(2, torch.tensor([7]), 100.0)

    pctx = PrecomputeContext(model.config, [Hook(N.LOGITS, only)])
    assert model.generate(IDS, attention_mask=mask, pctx=pctx, **options)[0, 21:].tolist() == [7, 7, 7, 7]


def test_gradients_flow_through_hooks_in_train_mode():
    for arch in ("opt", "gemma2", "gpt_neox"):
        model = hooked(random_model(arch, seed=1)).train()
        assert model.training
        assert model.unhooked.training
        steer = torch.zeros(64, requires_grad=True)
        names = [name for name in points(arch) if POINTS[name].shape == "b n d"]
        for name in [*names, N.ATTN_WEIGHTED_VALUES, N.ATTN_PROBS, N.VALUE_STATES]:
            scale = 1 if POINTS[name].shape == "b n d" else 0
            hook = Hook(name, lambda x, p, k=scale: x + steer if k else x * (1 + steer.sum()))  # noqa: B023
            model.zero_grad()
            steer.grad = None
            model(IDS, labels=IDS, use_cache=False, pctx=PrecomputeContext(model.config, [hook])).loss.backward()
            assert steer.grad.abs().sum() > 0, name
            assert next(model.parameters()).grad is not None
        for cached in (False, True):
            steer.grad = None
            hook = Hook(N.KEY_STATES, lambda x, p: x * (1 + steer.sum()))  # noqa: B023
            pctx = PrecomputeContext(model.config, [hook])
            model(IDS, labels=IDS, use_cache=cached, pctx=pctx).loss.backward()
            assert steer.grad.abs().sum() > 0


def test_bypassing_the_mask_makes_early_tokens_see_later_ones():
    model = shared_model("opt")
    kept = {}
    hooks = [
        Hook(N.PRE_MASK_ATTN_WEIGHTS, lambda x, p: kept.__setitem__(p.context["layer"], x)),
        Hook(N.POST_MASK_ATTN_WEIGHTS, lambda x, p: kept[p.context["layer"]]),
    ]
    other = IDS.clone()
    other[0, -1] = 99
    assert not close(run(model, hooks).logits[:, 0], run(model, hooks, other).logits[:, 0])
    assert close(model(IDS).logits[:, 0], model(other).logits[:, 0])


def test_variants_of_an_architecture():
    config = AutoConfig.for_model(
        "opt", vocab_size=512, hidden_size=64, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=128, max_position_embeddings=64, do_layer_norm_before=False, init_std=0.15,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    names = [name for name in ALL if name != N.POST_FINAL_LAYER_NORM]
    seen = Seen(names)
    out = run(model, seen.hooks, labels=IDS)
    assert torch.equal(out.logits, model(IDS).logits)
    assert seen[N.POST_TOK_EMBEDDINGS].shape == (1, 21, 32)
    layer = model.model.decoder.layers[0]
    mid = seen[N.POST_POS_EMBEDDINGS] + seen[N.ATTN_RESIDUAL, 0]
    assert close(mid, seen[N.POST_ATTN, 0])
    mid = layer.self_attn_layer_norm(mid)
    assert close(mid, seen[N.PRE_MLP, 0])
    assert close(layer.final_layer_norm(mid + seen[N.MLP_RESIDUAL, 0]), seen[N.POST_MLP, 0])
    with pytest.raises(UnsupportedModelError, match="no norm after"):
        run(model, [Hook(N.POST_FINAL_LAYER_NORM, lambda x, p: None)])

    model = random_model("gpt_neox", use_parallel_residual=False)
    plain = model(IDS).logits
    seen = Seen([N.POST_ATTN, N.POST_MLP, N.MLP_RESIDUAL])
    assert torch.equal(run(model, seen.hooks).logits, plain)
    assert close(seen[N.POST_ATTN, 1] + seen[N.MLP_RESIDUAL, 1], seen[N.POST_MLP, 1])
    # A change of the residual stream reaches what is added to it as well as the norm.
    seen = Seen([N.POST_ATTN, N.MLP_RESIDUAL, N.POST_MLP], change=lambda x: None)
    run(model, [Hook(N.POST_ATTN, lambda x, p: x + 5), *seen.hooks])
    assert close(seen[N.POST_ATTN, 1] + seen[N.MLP_RESIDUAL, 1], seen[N.POST_MLP, 1])

    model = random_model("gpt2", reorder_and_upcast_attn=True)
    with pytest.raises(UnsupportedModelError, match="reorder_and_upcast_attn"):
        run(model, [Hook(N.QUERY_STATES, lambda x, p: None)])


def test_what_a_reader_keeps_does_not_change_when_a_later_hook_changes_the_stream():
    model = shared_model("llama")
    kept = []
    run(
        model,
        [Hook(N.POST_ATTN, lambda x, p: kept.append(x), layers=0), Hook(N.POST_ATTN, lambda x, p: x + 5, layers=0)],
    )
    seen = Seen([N.POST_ATTN])
    run(model, seen.hooks)
    assert torch.equal(kept[0], seen[N.POST_ATTN, 0])


def test_what_skips_hooks_is_refused():
    model = random_model("gpt2")
    hook = Hook(N.POST_MLP, lambda x, p: None)
    with pytest.raises(ModelError, match="compiled"):
        run(torch.compile(model), [hook])
    model.transformer.h[0].compile()
    with pytest.raises(ModelError, match="compiled"):
        run(model, [hook])
    model = random_model("gpt2").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="again in the backward pass"):
        run(model, [hook])
    model = random_model("opt", layerdrop=1.0).train()
    with pytest.raises(ModelError, match="0 times"):
        run(model, [hook])
    model = random_model("gpt2")
    with pytest.raises(ModelError, match="inputs_embeds"), torch.no_grad():
        hooked(model)(
            inputs_embeds=torch.zeros(1, 3, 64),
            pctx=PrecomputeContext(model.config, [Hook(N.POST_TOK_EMBEDDINGS, lambda x, p: None)]),
        )
    with pytest.raises(ModelError, match="labels"):
        run(model, [Hook(N.UNREDUCED_LOSS, lambda x, p: None)])
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(UnsupportedModelError, match="Static"):
        run(model, [Hook(N.KEY_STATES, lambda x, p: None)], past_key_values=cache)
    with pytest.raises(InputTypeError, match="not a Hugging Face model"):
        hooked(torch.nn.Linear(2, 2))


def test_logits_and_loss_of_models_that_cap_their_logits():
    model = shared_model("gemma2")
    assert model.config.final_logit_softcapping
    out = run(model, [Hook(N.LOGITS, lambda x, p: x * 2)], labels=IDS)
    plain = model(IDS).logits
    assert torch.equal(out.logits, plain * 2)
    labels = IDS.clone()
    labels[0, :5] = -100
    losses = torch.nn.functional.cross_entropy((plain * 2)[0, :-1], IDS[0, 1:], reduction="none")
    assert close(out.loss, losses.mean())
    out = run(model, [Hook(N.UNREDUCED_LOSS, lambda x, p: x * 3)], labels=labels)
    assert close(out.loss, 3 * model(IDS, labels=labels).loss)
    short = run(model, [Hook(N.LOGITS, lambda x, p: x * 2, positions=[0, -1])], logits_to_keep=2)
    assert close(short.logits[:, 0], plain[:, -2])
    assert close(short.logits[:, 1], plain[:, -1] * 2)
