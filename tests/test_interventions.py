"""Interventions: prefixes that they do not touch are shared, runs that are not causal are found whole or not at all."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXT, shared_model, shared_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from promptdb import Engine, PromptDB, Recorder
from promptdb.adoption import LEAST_SHARED_TOKENS, adopt
from promptdb.errors import IdentityError, InputTypeError, ModelError, NotRecordedError, UnsupportedModelError
from promptdb.hook_points import HookVariableNames as N
from promptdb.hooks import Hook, PrecomputeContext, hooked
from promptdb.interventions import Intervention
from promptdb.keys import Root, pack_tokens

IDS = list(TEXT.encode()[:90])
STEER = torch.linspace(-1, 1, 64)


def _steer(x, pctx):
    return x + STEER


def _square(x, pctx):
    return x * x


def _later(x, pctx):
    """Each token gets something of those after it."""
    return x + x.mean(1, keepdim=True)


def _open_mask(x, pctx):
    return x.masked_fill(x < -1e30, 0)


def steering(first, name=N.POST_MLP, fn=_steer, layers=0):
    return Intervention("steer", [Hook(name, fn, layers=layers, positions=slice(first, None))])


def plain_logits(model, ids, intervention=None):
    hooks = () if intervention is None else intervention.hooks
    with torch.no_grad():
        pctx = PrecomputeContext(model.config, hooks)
        return hooked(model)(torch.tensor([ids]), pctx=pctx).logits[0]


def rows(model, ids, layer, intervention=None):
    kept = []
    hooks = () if intervention is None else intervention.hooks
    hook = Hook(N.POST_MLP, lambda x, pctx: kept.append(x[0].clone()), layers=layer)
    with torch.no_grad():
        hooked(model)(torch.tensor([ids]), pctx=PrecomputeContext(model.config, [*hooks, hook]))
    return kept[0]


def close(a, b):
    largest = float(b.abs().max()) if b.numel() else 1.0
    return a.shape == b.shape and torch.allclose(a, b, atol=2e-5 * max(1.0, largest), rtol=0)


def right(engine, ids):
    """Return whether an engine's result is that of a pass of the whole prompt under its hooks."""
    found, logits = engine.get(ids), plain_logits(engine.model, ids, engine.intervention)
    logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return close(found.logits, logits[-1]) and close(found.token_logprobs, logprobs)


# Prefixes that are not touched


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "opt"])
@pytest.mark.parametrize("point", [N.POST_MLP, N.KEY_STATES, N.ATTN_PROBS, N.PRE_ATTN])
def test_untouched_tokens_are_computed_once(arch, point):
    model = shared_model(arch)
    steer = steering(20, point, _square)
    assert steer.untouched_tokens == 20
    with PromptDB.in_memory(chunk_tokens=16) as db:
        plain = Engine(db, model, shared_tokenizer())
        other = Engine(db, model, shared_tokenizer(), intervention=steer)
        plain.put(IDS[:50])
        found = other.get(IDS)
        # One token is computed again for the logits after the 20, which nobody had asked for.
        assert (found.tokens_loaded, found.tokens_computed) == (19, 71)
        assert right(other, IDS)
        assert not close(found.logits, plain_logits(model, IDS)[-1])
        assert plain.lookup(IDS).num_tokens == 50
        assert right(plain, IDS)
        branch = [*IDS[:18], 1, 2, 3, *IDS[:20]]
        (found,) = other.run([branch])
        assert found.tokens_loaded in (17, 18)
        assert right(other, branch)
        # The plain model has what was computed for it: the first 20 tokens, and no more.
        assert plain.lookup(branch).num_tokens == 20
        assert right(plain, branch)
        assert db.verify() == []


@pytest.mark.parametrize("first", [LEAST_SHARED_TOKENS - 1, LEAST_SHARED_TOKENS, 31, 32, 33])
def test_the_boundary_is_exact(first):
    model, steer = shared_model("llama"), steering(first)
    shared = first if first >= LEAST_SHARED_TOKENS else 0
    for length in (first - 1, first, first + 1, first + 2, 60):
        with PromptDB.in_memory(chunk_tokens=16) as db:
            plain = Engine(db, model, shared_tokenizer())
            other = Engine(db, model, shared_tokenizer(), intervention=steer)
            prompt = IDS[:length]
            found = other.get(prompt)
            assert (found.tokens_loaded, found.tokens_computed) == (0, length)
            assert right(other, prompt)
            assert other.get(prompt).tokens_computed == 0
            assert plain.lookup(IDS).num_tokens == (min(shared, length) if length >= LEAST_SHARED_TOKENS else 0)
            assert right(plain, IDS)
            assert right(other, IDS)
            (recorded,) = Recorder(other, N.POST_MLP).run([IDS])
            for layer in range(2):
                assert close(recorded.tensor(N.POST_MLP, layer), rows(model, IDS, layer, steer))
            plain_rows = rows(model, IDS, 0)
            assert close(recorded.tensor(N.POST_MLP, 0)[:first], plain_rows[:first])
            assert not close(recorded.tensor(N.POST_MLP, 0)[first:], plain_rows[first:])
            assert db.verify() == []


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
@pytest.mark.parametrize("point", [N.KEY_STATES, N.VALUE_STATES])
def test_changed_keys_and_values_are_not_changed_again(arch, point):
    """Whatever is loaded and wherever a pass begins, before or after the first token that is touched."""
    model = shared_model(arch)
    for first in (0, 33):
        for cut in (12, 34, 41, 59):
            with PromptDB.in_memory(chunk_tokens=8) as db:
                steer = steering(first, point, _square, layers=1)
                engine = Engine(db, model, shared_tokenizer(), intervention=steer, write_behind=False)
                engine.put(IDS[:cut])
                found = engine.get(IDS[:60])
                assert cut < first or found.tokens_loaded == cut
                assert right(engine, IDS[:60])
                written = engine.generate(IDS[:60], max_new_tokens=3, do_sample=False)[0].tolist()
                for end in range(60, len(written)):
                    assert written[end] == int(plain_logits(model, written[:end], steer)[-1].argmax())


def _running(x, pctx):
    return x.cumsum(1)


@pytest.mark.parametrize("positions", [slice(40, None), slice(None, 40), [2, 50], [50, 51, 52, 53, 54, 70]])
def test_a_hook_is_tried_where_it_touches_something(positions):
    """The rows that it gets in a later pass begin elsewhere: this one sums from there."""
    later = Intervention("running", [Hook(N.ATTN_RESIDUAL, _running, layers=0, positions=positions)])
    with PromptDB.in_memory() as db, pytest.raises(UnsupportedModelError, match="computed in steps differs"):
        Engine(db, shared_model("llama"), shared_tokenizer(), intervention=later)


def test_a_hook_that_begins_too_far_away_to_be_tried_is_refused():
    model = shared_model("llama")
    for positions in (slice(2049, None), [3, 5000]):
        far = Intervention("far", [Hook(N.POST_MLP, _steer, layers=0, positions=positions)])
        with PromptDB.in_memory() as db, pytest.raises(UnsupportedModelError, match="behind 2048 tokens is not tried"):
            Engine(db, model, shared_tokenizer(), intervention=far)
    with PromptDB.in_memory() as db:  # where it ends is not where it begins
        until = Intervention("until", [Hook(N.POST_MLP, _steer, layers=0, positions=slice(2, 1 << 40))])
        engine = Engine(db, model, shared_tokenizer(), intervention=until)
        assert right(engine, IDS)


def test_what_may_touch_any_token_shares_nothing():
    cases = [
        Hook(N.POST_MLP, _steer, layers=0),
        Hook(N.POST_MLP, _steer, positions=slice(None, 40)),
        Hook(N.POST_MLP, _steer, positions=slice(60, 20, -1)),
        Hook(N.POST_MLP, _steer, positions=[50, 0, 70]),
        Hook("model.layers.0.mlp", _steer, positions=slice(30, None)),
    ]
    for hook in cases:
        assert Intervention("steer", [hook, Hook(N.POST_MLP, _steer, positions=[40])]).untouched_tokens == 0
    two = [Hook(N.POST_MLP, _steer, positions=[40, 50]), Hook(N.POST_ACT, _steer, positions=slice(30, None, 2))]
    assert Intervention("steer", two).untouched_tokens == 30
    assert Intervention("steer", two, causal=False).untouched_tokens == 0


def test_a_damaged_or_foreign_prefix_is_not_adopted(store_path):
    model, steer = shared_model("llama"), steering(32)
    with PromptDB(store_path, chunk_tokens=16, verify_reads="always") as db:
        plain = Engine(db, model, shared_tokenizer())
        other = Engine(db, model, shared_tokenizer(), intervention=steer)
        plain.put(IDS[:40])
        node = plain.lookup(IDS).steps[1].node

        def damage(writer):
            key = node + b"kv"
            value = bytearray(writer.get("blobs", key))
            value[-3] ^= 1
            writer.put("blobs", key, value)

        db._index.transact(damage)
        assert right(other, IDS)
        with Engine(db, model, shared_tokenizer(), namespace="b", intervention=steer) as apart:
            assert apart.get(IDS).tokens_computed == len(IDS)
            assert right(apart, IDS)
        strict = Engine(db, model, shared_tokenizer(), strict=True, intervention=steer, namespace="c")
        assert right(strict, IDS)
        assert adopt(db, plain.root, Root("00" * 32, "11" * 32), pack_tokens([300, 301])) == 0
        db.verify(fix=True)
        assert right(other, IDS)
        assert right(plain, IDS)


# Not causal


@pytest.mark.parametrize(
    "hook",
    [Hook(N.ATTN_RESIDUAL, _later), Hook(N.POST_MASK_ATTN_WEIGHTS, _open_mask), Hook(N.PRE_MLP, _later, layers=1)],
)
def test_hooks_that_are_not_causal_have_to_be_declared(db, hook):
    model = shared_model("gpt2")
    with pytest.raises(UnsupportedModelError, match="causal=False"):
        Engine(db, model, shared_tokenizer(), intervention=Intervention("later", [hook]))
    declared = Intervention("later", [hook], causal=False)
    assert declared.id != Intervention("later", [hook]).id
    with (
        Engine(db, model, shared_tokenizer(), intervention=declared) as engine,
        Engine(db, model, shared_tokenizer()) as plain,
    ):
        for prompt in (IDS, IDS[:50], [*IDS, 1], [*IDS[:50], 2]):
            assert engine.lookup(prompt).num_tokens == 0
            assert engine.get(prompt).tokens_computed == len(prompt)
            assert right(engine, prompt)
            assert engine.get(prompt).tokens_loaded == len(prompt)
            assert plain.lookup(prompt).num_tokens == 0
        engine.flush()
        assert [found.tokens_computed for found in engine.run([IDS[:50], IDS, IDS[:49]])] == [0, 0, 49]
        (recorded,) = Recorder(engine, [N.POST_MLP, N.KEY_STATES]).run([IDS])
        with pytest.raises(UnsupportedModelError, match="end at their own token"):
            Recorder(engine, N.ATTN_PROBS)
        assert close(recorded.tensor(N.POST_MLP, 1), rows(model, IDS, 1, declared))
        assert recorded.root.intervention_id == declared.id_for(IDS)
        assert torch.equal(
            db.activations(IDS, N.POST_MLP, 1, intervention=declared.id_for(IDS)), recorded.tensor(N.POST_MLP, 1)
        )
        with pytest.raises(NotRecordedError):
            db.activations(IDS[:50], N.POST_MLP, 1, intervention=declared.id_for(IDS[:50]))
        with pytest.raises((NotRecordedError, InputTypeError)):
            db.activations(IDS, N.POST_MLP, 1, intervention=declared.id)
        for wrong in (
            lambda: engine.generate(IDS, max_new_tokens=2),
            lambda: next(engine.generate_many([IDS])),
            lambda: engine.score([(IDS[:5], IDS[5:])]),
            lambda: engine.classify("a", ["b", "c"]),
            lambda: engine.plan([IDS]),
        ):
            with pytest.raises(UnsupportedModelError, match="depends on those after it"):
                wrong()
    assert db.verify() == []


def test_a_whole_run_is_never_extended_and_positions_may_count_from_its_end(store_path):
    model = shared_model("llama")
    last = Intervention("last", [Hook(N.POST_MLP, _steer, positions=[0, -1])], causal=False)
    with pytest.raises(InputTypeError, match="from a sequence's end"):
        Intervention("last", [Hook(N.POST_MLP, _steer, positions=[0, -1])])
    with pytest.raises(InputTypeError, match="causal"):
        Intervention("last", [Hook(N.POST_MLP, _steer)], causal="no")
    with PromptDB(store_path, chunk_tokens=16) as db:
        for only_last in (False, True):
            engine = Engine(db, model, shared_tokenizer(), intervention=last, write_behind=False)
            assert right(engine, IDS)
            steps = engine.lookup(IDS).steps
            db.remove(steps[-1].node if only_last else steps[2].node)
            assert 0 < engine.lookup(IDS).num_tokens < len(IDS)
            engine = Engine(db, model, shared_tokenizer(), intervention=last, write_behind=False)
            assert engine.get(IDS).tokens_computed == len(IDS)
            assert right(engine, IDS)
            assert db.verify() == []
        runner = engine._extender.runner
        for call in (
            lambda: runner.step(torch.tensor(IDS), None, 10, 90),
            lambda: runner.step(torch.tensor(IDS), None, 0, 9),
        ):
            with pytest.raises(ModelError, match="whole"):
                call()


KINDS = [
    None,
    steering(20),
    steering(33, N.VALUE_STATES, _square, layers=1),
    steering(0),
    Intervention("later", [Hook(N.ATTN_RESIDUAL, _later)], causal=False),
]


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@example([(2, 53, 43, "get"), (2, 50, 45, "record")])
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(KINDS) - 1),
            st.integers(1, 60),
            st.integers(0, 60),
            st.sampled_from(["get", "run", "record", "remove"]),
        ),
        min_size=2,
        max_size=7,
    )
)
def test_no_two_kinds_of_runs_ever_mix(steps):
    model = shared_model("llama")
    with PromptDB.in_memory(chunk_tokens=8) as db:
        engines = [Engine(db, model, shared_tokenizer(), intervention=kind, write_behind=False) for kind in KINDS]
        for which, length, parting, what in steps:
            engine, prompt = engines[which], [*IDS[:length]]
            prompt[parting:] = [each ^ 1 for each in prompt[parting:]]
            if what == "record":
                (found,) = Recorder(engine, N.POST_MLP, layers=1).run([prompt])
                assert close(found.tensor(N.POST_MLP, 1), rows(model, prompt, 1, KINDS[which]))
            elif what == "run":
                for ids, found in zip((prompt, IDS[:9]), engine.run([prompt, IDS[:9]]), strict=True):
                    assert close(found.logits, plain_logits(model, ids, KINDS[which])[-1])
            elif what == "remove":
                nodes = engine.lookup(prompt).steps
                if nodes:
                    db.remove(nodes[len(nodes) // 2].node)
            assert right(engine, prompt)
        assert db.verify() == []


def test_a_module_of_ones_own_is_refused_and_a_library_is_not(tmp_path, monkeypatch):
    import importlib

    (tmp_path / "own_helper.py").write_text("SCALE = 2\n\ndef scale(x):\n    return x * SCALE\n")
    (tmp_path / "own_hooks.py").write_text(
        "import math\n\nimport own_helper\nfrom own_helper import scale\n\n"
        "def by_module(x, pctx):\n    return own_helper.scale(x)\n\n"
        "def inside(x, pctx):\n    import own_helper\n\n    return own_helper.scale(x)\n\n"
        "def by_name(x, pctx):\n    return scale(x) * math.sqrt(2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("own_hooks")
    # What a module of one's own holds may change under its name, which an ID would not see.
    for function in (module.by_module, module.inside):
        with pytest.raises(IdentityError, match="module own_helper"):
            Intervention("scale", [Hook(N.POST_MLP, function)])
    before = Intervention("scale", [Hook(N.POST_MLP, module.by_name)]).id
    (tmp_path / "own_helper.py").write_text("SCALE = 3\n\ndef scale(x):\n    return x * SCALE\n")
    importlib.invalidate_caches()
    monkeypatch.delitem(importlib.sys.modules, "own_helper")
    monkeypatch.delitem(importlib.sys.modules, "own_hooks")
    again = importlib.import_module("own_hooks")
    assert Intervention("scale", [Hook(N.POST_MLP, again.by_name)]).id != before
