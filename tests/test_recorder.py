"""Recorded activations against hooks on a plain model: exact, once, resumable, found, evicted and verified."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
import torch
from children import Child
from conftest import TEXT, shared_model, shared_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptdb import Engine, PromptDB
from promptdb.activations import Series
from promptdb.demo_models import random_model
from promptdb.errors import (
    IdentityError,
    InputTypeError,
    NonFiniteError,
    NotRecordedError,
    QuotaExceededError,
    ReadOnlyStoreError,
    TokenRangeError,
    UnsupportedModelError,
)
from promptdb.format import ACTIVATIONS, META, STORE_KEY, unpack_record
from promptdb.hook_points import HookVariableNames as N
from promptdb.hooks import Hook, PrecomputeContext, hooked
from promptdb.interventions import Intervention
from promptdb.recorder import Recorder
from promptdb.runner import Runner

ARCHITECTURES = ("gpt2", "opt", "llama", "gemma2", "qwen3_moe")
IDS = list(TEXT.encode()[:90])


@pytest.fixture
def engine(db):
    with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        yield engine


def expected(model, ids, point, layer=None, hooks=()):
    """Return what a plain pass of the whole prompt shows a hook."""
    kept = []
    hook = Hook(point, lambda x, pctx: kept.append(x[0].clone()), layers=layer)
    with torch.no_grad():
        hooked(model)(torch.tensor([ids]), pctx=PrecomputeContext(model.config, [*hooks, hook]))
    return kept[0].transpose(0, 1) if kept[0].dim() == 3 else kept[0]


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and torch.allclose(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=0)


def passes(engine):
    """Count the tokens that go through the model."""
    counts = []
    inner = engine.model.get_input_embeddings()
    handle = inner.register_forward_hook(lambda module, args, output: counts.append(output.shape[1]))
    # Watched models refuse hooks that nobody accounts for.
    next(iter(inner._forward_hooks.values())).__promptdb_identified__ = True
    return counts, handle


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_recorded_is_what_a_plain_pass_shows(db, arch):
    model = shared_model(arch)
    points = [N.POST_POS_EMBEDDINGS, N.POST_MLP, N.ATTN_RESIDUAL, N.QUERY_STATES, N.KEY_STATES, N.POST_FINAL_LAYER_NORM]
    with Engine(db, model, shared_tokenizer()) as engine:
        (cold,) = Recorder(engine, points).run([IDS])
        assert cold.tokens_computed == len(IDS)
        root = engine.root
        for point, layer in cold.points:
            whole = expected(model, IDS, point, layer)
            assert close(cold.tensor(point, layer), whole), (point, layer)
            read = db.activations(IDS, point, layer, model=root.weights_id, tokenizer=root.tokenizer_id)
            assert torch.equal(read, cold.tensor(point, layer))
            assert torch.equal(db.activations(IDS[:50], point, layer, positions=slice(7, 33)), read[7:33])
            assert torch.equal(db.activations(IDS, point, layer, positions=-1), read[-1:])
        assert Recorder(engine, points).run([IDS])[0].tokens_computed == 0
        every = cold.tensors()
        assert list(every) == list(cold.points)
        assert all(torch.equal(rows, cold.tensor(*where)) for where, rows in every.items())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_recording_after_a_hit_equals_recording_cold(db, arch):
    model = shared_model(arch)
    with Engine(db, model, shared_tokenizer()) as engine:
        engine.put(IDS[:50])
        engine.put(IDS)
        counts, handle = passes(engine)
        (found,) = Recorder(engine, [N.POST_MLP, N.MLP_RESIDUAL], layers=0).run([IDS])
        handle.remove()
        assert sum(counts) == found.tokens_computed == len(IDS)
        assert close(found.tensor(N.POST_MLP, 0), expected(model, IDS, N.POST_MLP, 0))
        assert close(found.tensor(N.MLP_RESIDUAL, 0), expected(model, IDS, N.MLP_RESIDUAL, 0))
        # Another layer later: with the stored past, which is that of the whole model.
        (deeper,) = Recorder(engine, [N.POST_MLP], layers=1, positions=slice(60, None)).run([IDS])
        assert deeper.tokens_computed == 30
        assert close(deeper.tensor(N.POST_MLP, 1), expected(model, IDS, N.POST_MLP, 1)[60:])


def test_a_pass_ends_after_the_deepest_layer_wanted(engine):
    engine.put(IDS)
    seen = []
    layers = engine.model.model.layers
    handles = [layer.register_forward_hook(lambda *a, n=n: seen.append(n)) for n, layer in enumerate(layers)]
    for layer in layers:
        next(iter(layer._forward_hooks.values())).__promptdb_identified__ = True
    Recorder(engine, [N.POST_MLP, N.POST_TOK_EMBEDDINGS], layers=0).run([IDS])
    assert seen == [0]
    Recorder(engine, [N.POST_MLP], layers=-1).run([IDS])
    assert seen == [0, 0, 1]
    for handle in handles:
        handle.remove()


def test_overlapping_prompts_store_each_position_once(engine, db):
    prompts = [IDS[:70], [*IDS[:45], 1, 2, 3], [*IDS[:45], 1, 2, 9, 9], IDS[:30], IDS]
    recordings = Recorder(engine, N.POST_MLP, layers=[1]).run(prompts)
    distinct = {tuple(prompt[: n + 1]) for prompt in prompts for n in range(len(prompt))}
    (found,) = db.recorded()
    assert found.num_rows == len(distinct)
    assert sum(each.tokens_computed for each in recordings) <= len(distinct) + 2 * len(prompts)
    for prompt, recording in zip(prompts, recordings, strict=True):
        assert close(recording.tensor(N.POST_MLP, 1), expected(engine.model, prompt, N.POST_MLP, 1))
        assert recording.token_ids == tuple(prompt)


def test_more_positions_join_those_that_are_there(engine, db):
    whole = expected(engine.model, IDS, N.POST_MLP, 0)
    (first,) = Recorder(engine, N.POST_MLP, layers=0, positions=[3, 40, -1]).run([IDS])
    assert first.positions == (3, 40, 89)
    assert close(first.tensor(N.POST_MLP, 0), whole[[3, 40, 89]])
    with pytest.raises(NotRecordedError, match="of 90 positions"):
        db.activations(IDS, N.POST_MLP, 0)
    (second,) = Recorder(engine, N.POST_MLP, layers=0, positions=slice(2, 50)).run([IDS])
    assert close(second.tensor(N.POST_MLP, 0), whole[2:50])
    (third,) = Recorder(engine, N.POST_MLP, layers=0).run([IDS])
    assert close(third.tensor(N.POST_MLP, 0), whole)
    (found,) = db.recorded()
    assert found.num_rows == len(IDS)
    assert Recorder(engine, N.POST_MLP, layers=0).run([IDS])[0].tokens_computed == 0


def test_texts_dtypes_and_module_paths(engine, db):
    (found,) = Recorder(engine, ["model.layers.1.mlp.up_proj", N.POST_MLP], layers=0, dtype="float16").run([TEXT])
    whole = expected(engine.model, list(found.token_ids), "model.layers.1.mlp.up_proj")
    half = db.activations(TEXT, "model.layers.1.mlp.up_proj")
    assert half.dtype == torch.float16
    assert torch.equal(half, whole.half()) or close(half.float(), whole, 2e-3)
    Recorder(engine, N.POST_MLP, layers=0).run([TEXT])
    with pytest.raises(InputTypeError, match="F16, F32"):
        db.activations(TEXT, N.POST_MLP, 0)
    assert db.activations(TEXT, N.POST_MLP, 0, dtype="F32").dtype == torch.float32
    assert torch.equal(db.activations(TEXT, "blocks.0.hook_resid_post", dtype="F16"), found.tensor(N.POST_MLP, 0))


def test_models_and_prompts_are_never_mixed(db):
    a, b = shared_model("llama"), shared_model("gpt2")
    with Engine(db, a, shared_tokenizer()) as one, Engine(db, b, shared_tokenizer()) as two:
        Recorder(one, N.POST_MLP, layers=0).run([IDS])
        with pytest.raises(NotRecordedError):
            db.activations(IDS, N.POST_MLP, 0, model=two.root.weights_id, tokenizer=two.root.tokenizer_id)
        Recorder(two, N.POST_MLP, layers=0).run([IDS])
        with pytest.raises(InputTypeError, match="2 models"):
            db.activations(IDS, N.POST_MLP, 0)
        read = db.activations(IDS, N.POST_MLP, 0, model=two.root.weights_id)
        assert close(read, expected(b, IDS, N.POST_MLP, 0))
        with pytest.raises(NotRecordedError):
            db.activations(IDS[::-1], N.POST_MLP, 0, model=two.root.weights_id)


def test_activations_go_with_their_span(db, engine):
    (found,) = Recorder(engine, N.POST_MLP).run([IDS])
    charged = db.stat()["charged_bytes"]
    node = engine.lookup(IDS).steps[-1].node
    db.remove(node)
    assert db.stat()["charged_bytes"] < charged
    with pytest.raises(NotRecordedError):
        found.tensor(N.POST_MLP, 0)
    (again,) = Recorder(engine, N.POST_MLP).run([IDS])
    assert close(again.tensor(N.POST_MLP, 1), expected(engine.model, IDS, N.POST_MLP, 1))
    assert db.remove_activations(N.POST_MLP, 0) == len(engine.lookup(IDS).steps)
    assert [each.series.layer for each in db.recorded()] == [1]
    db.remove_activations(N.POST_MLP)
    assert db.recorded() == []
    assert db.verify() == []
    db.remove(engine.lookup(IDS).steps[0].node)
    assert db.stat()["charged_bytes"] == 0


def test_quota_and_eviction_count_activations(store_path):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with PromptDB(store_path, chunk_tokens=16) as db, Engine(db, model, tokenizer, write_behind=False) as engine:
        Recorder(engine, N.POST_MLP).run([IDS])
        with_rows = db.stat()["charged_bytes"]
        db.set_quota(with_rows)
        for start in range(1, 6):
            other = [start] * 3 + IDS[:60]
            (found,) = Recorder(engine, N.POST_MLP).run([other])
            assert found.tensor(N.POST_MLP, 0).shape == (63, 64)
            assert db.stat()["charged_bytes"] <= with_rows
        assert db.stat()["num_evicted"] > 0
        assert db.verify() == []
        db.set_quota(20_000)
        with pytest.raises(QuotaExceededError):
            Recorder(engine, [N.POST_MLP, N.POST_ACT]).run([IDS])
        assert db.verify() == []


def test_damage_is_noticed_found_by_verify_and_recorded_again(store_path):
    with PromptDB(store_path, chunk_tokens=16) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        Recorder(engine, N.POST_MLP, layers=0).run([IDS])
        key = Series(N.POST_MLP, 0, "F32").key(engine.lookup(IDS).steps[2].node)

        def damage(writer):
            value = bytearray(writer.get(ACTIVATIONS, key))
            value[-3] ^= 1
            writer.put(ACTIVATIONS, key, value)

        db._index.transact(damage)
        with PromptDB(store_path, verify_reads="always") as fresh, pytest.raises(ValueError, match="checksum"):
            fresh.activations(IDS, N.POST_MLP, 0)
        assert [(each.table, each.key) for each in db.verify()] == [(ACTIVATIONS, key.hex())]
        with PromptDB(store_path, verify_reads="always") as db2, Engine(db2, engine.model, shared_tokenizer()) as other:
            (found,) = Recorder(other, N.POST_MLP, layers=0).run([IDS])
            assert found.tokens_computed == 16
            assert close(found.tensor(N.POST_MLP, 0), expected(engine.model, IDS, N.POST_MLP, 0))
        assert db.verify() == []
        db._index.transact(damage)
        db.verify(fix=True)
        assert db.verify() == []
        assert db.recorded()[0].num_rows == len(IDS) - 16
        db._index.transact(lambda writer: writer.put(ACTIVATIONS, bytes(32) + b"x\0\0F32", bytes(40)))
        assert db.gc().num_leftovers == 1
        assert db.verify() == []


def test_stores_say_that_they_hold_activations(store_path):
    with PromptDB(store_path) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        Recorder(engine, N.POST_MLP, layers=0).run([IDS[:5]])
        with db.read() as snapshot:
            assert unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))["format_version"] == 3


@pytest.mark.parametrize(
    ("points", "options", "error", "reason"),
    [
        ([], {}, InputTypeError, "nothing to record"),
        (N.POST_MLP, {"layers": 2}, InputTypeError, "the model has 2"),
        (N.POST_MLP, {"layers": []}, InputTypeError, "nothing"),
        ("post-mlpp", {}, InputTypeError, "no point"),
        ("model.layers.9.mlp", {}, InputTypeError, "no module"),
        (N.UNREDUCED_LOSS, {}, UnsupportedModelError, "token_logprobs"),
        (N.POST_MLP, {"dtype": "int8"}, InputTypeError, "cannot be stored"),
        (N.POST_MLP, {"positions": "all"}, InputTypeError, "integers"),
    ],
)
def test_what_cannot_be_recorded_is_refused(engine, points, options, error, reason):
    with pytest.raises(error, match=reason):
        Recorder(engine, points, **options)
    hooks = [hook for module in engine.model.modules() for hook in module._forward_hooks.values()]
    assert not any(hook.__module__.startswith("promptdb") for hook in hooks)


def test_engines_and_readers_that_cannot_be_used(db, store_path):
    with (
        Engine(db, shared_model("gpt2"), shared_tokenizer(), strict=True) as engine,
        pytest.raises(UnsupportedModelError, match="strict"),
    ):
        Recorder(engine, N.POST_MLP)
    with Engine(db, shared_model("gpt2"), shared_tokenizer()) as engine:
        engine.put(IDS)
        scale = Intervention("huge", [Hook(N.POST_FINAL_LAYER_NORM, _huge)])
        with Engine(db, shared_model("gpt2"), shared_tokenizer(), intervention=scale) as huge:
            recorder = Recorder(huge, N.POST_FINAL_LAYER_NORM, dtype="float16")
            with pytest.raises(NonFiniteError, match="float16"):
                recorder.run([IDS])
        with pytest.raises(NotRecordedError, match="not recorded"):
            db.activations(IDS, N.POST_MLP, 0, model=engine.root.weights_id, tokenizer=engine.root.tokenizer_id)
        for wrong in ({"layer": None}, {"layer": -1}, {"layer": 1, "positions": [200]}, {"layer": True}):
            with pytest.raises(InputTypeError):
                db.activations(IDS, N.POST_MLP, model=engine.root.weights_id, **wrong)
    with (
        PromptDB(store_path, readonly=True) as reading,
        Engine(reading, shared_model("gpt2"), shared_tokenizer()) as one,
        pytest.raises(ReadOnlyStoreError),
    ):
        Recorder(one, N.POST_MLP)


def _huge(x, pctx):
    return x * 1e6


# Interventions

STEER = torch.linspace(-1, 1, 64)


def _steer(x, pctx):
    return x + STEER


def test_an_intervention_has_a_root_of_its_own(db):
    model = shared_model("llama")
    steer = Intervention("steer", [Hook(N.POST_MLP, _steer, layers=0)])
    with (
        Engine(db, model, shared_tokenizer()) as plain,
        Engine(db, model, shared_tokenizer(), intervention=steer) as other,
    ):
        assert other.root.intervention_id == steer.id
        rep = other.get(IDS)
        assert rep.tokens_loaded == 0
        with torch.no_grad():
            pctx = steer.context(model.config)
            logits = hooked(model)(torch.tensor([IDS]), pctx=pctx).logits[0, -1]
            own = model(torch.tensor([IDS])).logits[0, -1]
        assert close(rep.logits, logits)
        assert plain.get(IDS).tokens_computed == len(IDS)
        assert close(plain.get(IDS).logits, own)
        assert other.get(IDS).tokens_loaded == len(IDS)
        longer = [*IDS, 7, 8, 9]
        with torch.no_grad():
            logits = hooked(model)(torch.tensor([longer]), pctx=steer.context(model.config)).logits[0, -1]
        assert other.get(longer).tokens_loaded >= len(IDS) - 1
        assert close(other.get(longer).logits, logits)
        for prompt, found in zip((longer, [*IDS[:40], 3]), other.run([longer, [*IDS[:40], 3]]), strict=True):
            with torch.no_grad():
                logits = hooked(model)(torch.tensor([prompt]), pctx=steer.context(model.config)).logits[0, -1]
            assert close(found.logits, logits)
        (recorded,) = Recorder(other, N.POST_MLP).run([longer])
        assert close(recorded.tensor(N.POST_MLP, 0), expected(model, longer, N.POST_MLP, 0, steer.hooks))
        assert close(recorded.tensor(N.POST_MLP, 0), expected(model, longer, N.POST_MLP, 0) + STEER)
        with pytest.raises(NotRecordedError):
            db.activations(longer, N.POST_MLP, 0, model=plain.root.weights_id, tokenizer=plain.root.tokenizer_id)
        tokens = other.generate(longer, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=1)
        with torch.no_grad():
            for _ in range(5):
                logits = hooked(model)(torch.tensor([longer]), pctx=steer.context(model.config)).logits[0, -1]
                longer = [*longer, int(logits.argmax())]
        assert tokens[0].tolist() == longer


def test_the_id_follows_everything_that_a_function_depends_on():
    def make(scale, bias, name="a", version="1", **options):
        return Intervention(name, [Hook(N.POST_MLP, lambda x, p: x * scale + bias, **options)], version=version)

    bias = torch.ones(64)
    ids = [
        make(1.0, bias).id, make(2.0, bias).id, make(1.0, bias * 2).id, make(1.0, bias, name="b").id,
        make(1.0, bias, version="2").id, make(1.0, bias, layers=0).id, make(1.0, bias, positions=[3]).id,
        Intervention("a", [Hook(N.POST_MLP, _steer)]).id, Intervention("a", [Hook(N.POST_MLP, _huge)]).id,
        Intervention("a", [Hook(N.POST_MLP, _steer)], parameters={"k": 1}).id,
    ]  # fmt: skip
    assert len(set(ids)) == len(ids)
    assert make(1.0, torch.ones(64)).id == ids[0]
    each = make(1.0, bias)
    bias += 1
    assert each.id != ids[0]


def test_what_cannot_be_identified_or_extended_is_refused(db):
    model, state = shared_model("gpt2"), object()
    with pytest.raises(IdentityError, match="state is a object"):
        Intervention("opaque", [Hook(N.POST_MLP, lambda x, p: x if state else None)])
    with pytest.raises(IdentityError, match="cannot be identified"):
        Intervention("opaque", [Hook(N.POST_MLP, torch.nn.Linear(2, 2).__call__)])
    with pytest.raises(InputTypeError, match="from a sequence's end"):
        Intervention("last", [Hook(N.POST_MLP, _steer, positions=-1)])
    with pytest.raises(InputTypeError, match="without hooks"):
        Intervention("none", [])
    mean = Intervention("mean", [Hook(N.ATTN_RESIDUAL, lambda x, p: x - x.mean(1, keepdim=True))])
    with pytest.raises(UnsupportedModelError, match="in steps"):
        Engine(db, model, shared_tokenizer(), intervention=mean)
    missing = Intervention("no", [Hook(N.POST_ATTN, _steer)])
    with pytest.raises(UnsupportedModelError, match="together"):
        Engine(db, shared_model("phi"), shared_tokenizer(), intervention=missing)
    assert model(torch.tensor([IDS])).logits.isfinite().all()
    # Hooks that were attached by hand, without an ID: nothing is computed for the store.
    attached = hooked(model).attach([Hook(N.POST_MLP, _steer)])
    with attached, pytest.raises(IdentityError, match="forward hook"), Engine(db, model, shared_tokenizer()) as engine:
        engine.get(IDS)
    with Engine(db, model, shared_tokenizer()) as engine:
        attached = hooked(model).attach([Hook(N.POST_MLP, _steer)])
        with attached, pytest.raises(IdentityError, match="forward hook"):
            engine.get(IDS)
    assert db.stat()["num_nodes"] == 0


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.booleans()), min_size=2, max_size=6))
def test_plain_and_intervened_runs_never_mix(steps):
    model = shared_model("gpt2")
    kinds = [None, *(Intervention("scale", [Hook(N.POST_MLP, _steer, layers=layer)]) for layer in (0, 1))]
    with PromptDB.in_memory(chunk_tokens=8) as db:
        engines = [Engine(db, model, shared_tokenizer(), intervention=kind, write_behind=False) for kind in kinds]
        for which, length, records in steps:
            prompt, hooks = IDS[:length], [] if kinds[which] is None else kinds[which].hooks
            if records:
                (found,) = Recorder(engines[which], N.POST_MLP, layers=1).run([prompt])
                assert close(found.tensor(N.POST_MLP, 1), expected(model, prompt, N.POST_MLP, 1, hooks))
            with torch.no_grad():
                pctx = PrecomputeContext(model.config, hooks)
                logits = hooked(model)(torch.tensor([prompt]), pctx=pctx).logits[0, -1]
            assert close(engines[which].get(prompt).logits, logits)
        assert db.verify() == []


# Processes

RECORD = """
import sys
from promptdb import Engine, PromptDB
from promptdb.demo_models import random_model
from promptdb.demo_text import byte_tokenizer
from promptdb.recorder import Recorder
with PromptDB(sys.argv[1], chunk_tokens=16) as db, Engine(db, random_model("llama"), byte_tokenizer()) as engine:
    recorder = Recorder(engine, ["post-mlp"])
    for number in range(int(sys.argv[2])):
        recorder.run([[number % 7] * 4 + [number, *range(60)]])
        print(number, flush=True)
"""


def test_a_killed_recording_resumes_with_nothing_missing_or_doubled(store_path):
    with Child(RECORD, store_path, 40) as child:
        for line in child.stdout:
            if int(line) == 4:
                child.kill()
                break
        assert child.wait() == -signal.SIGKILL
    prompts = [[number % 7] * 4 + [number, *range(60)] for number in range(8)]
    with PromptDB(store_path, chunk_tokens=16) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        assert db.verify() == []
        recordings = Recorder(engine, N.POST_MLP).run(prompts)
        assert [each.tokens_computed for each in recordings[:5]] == [0] * 5
        distinct = {tuple(prompt[: n + 1]) for prompt in prompts for n in range(len(prompt))}
        assert all(each.num_rows >= len(distinct) for each in db.recorded())
        for prompt, found in zip(prompts, recordings, strict=True):
            assert close(found.tensor(N.POST_MLP, 1), expected(engine.model, prompt, N.POST_MLP, 1))
        assert db.verify() == []


def test_reading_needs_neither_model_nor_transformers(store_path):
    with PromptDB(store_path) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        Recorder(engine, N.POST_MLP, layers=0).run([IDS])
    code = f"""
import sys
from promptdb import PromptDB
with PromptDB({str(store_path)!r}, readonly=True) as db:
    assert db.recorded()[0].num_rows == {len(IDS)}
    assert "torch" not in sys.modules
    assert list(db.activations({IDS!r}, "post-mlp", 0).shape) == [{len(IDS)}, 64]
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Datasets


def rows_of(batches):
    return {tuple(row.tolist()) for batch in batches for row in batch}


def test_a_dataset_gives_each_row_once_shuffled_and_resumes(store_path):
    from torch.utils.data import DataLoader

    with PromptDB(store_path, chunk_tokens=16) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        prompts = [[number, *IDS[: 50 + number]] for number in range(8)]
        Recorder(engine, N.POST_MLP, layers=1).run(prompts)
        (found,) = db.recorded()
        data = db.activation_dataset(N.POST_MLP, 1, batch_size=10, shuffle_buffer=64)
        assert data.num_rows == found.num_rows
        batches = list(data)
        every = torch.cat(batches)
        assert every.shape == (found.num_rows, 64)
        assert [len(batch) for batch in batches[:-1]] == [10] * (len(batches) - 1)
        stored = {tuple(r.tolist()) for p in prompts for r in db.activations(p, N.POST_MLP, 1)}
        assert rows_of(batches) == stored
        assert torch.equal(torch.cat(list(data)), every)
        plain = torch.cat(list(db.activation_dataset(N.POST_MLP, 1, batch_size=10, shuffle_buffer=0)))
        assert rows_of([plain]) == stored
        assert not torch.equal(plain, every)
        data.set_epoch(1)
        assert not torch.equal(torch.cat(list(data)), every)
        for skip in (0, 1, 7, len(batches) - 1, len(batches), len(batches) + 5):
            data.resume(0, skip)
            rest = list(data)
            assert len(rest) == max(0, len(batches) - skip)
            assert all(torch.equal(a, b) for a, b in zip(rest, batches[skip:], strict=True))
        data.set_epoch(0)
        several = list(DataLoader(data, batch_size=None, num_workers=2))
        assert rows_of(several) == stored
        assert sum(len(batch) for batch in several) == found.num_rows
        for skip in (5, len(several) - 2):
            data.resume(0, skip)
            rest = list(DataLoader(data, batch_size=None, num_workers=2))
            assert all(torch.equal(a, b) for a, b in zip(rest, several[skip:], strict=True))
        with pytest.raises(NotRecordedError):
            db.activation_dataset(N.POST_MLP, 0)
        with pytest.raises(InputTypeError, match="batch_size"):
            db.activation_dataset(N.POST_MLP, 1, batch_size=0)
        db.remove(engine.lookup(prompts[0]).steps[-1].node)
        data.set_epoch(0)
        with pytest.raises(NotRecordedError, match="any more"):
            list(data)


def test_engines_on_one_model_in_several_threads_keep_out_of_each_others_passes(store_path):
    model, clean = random_model("gpt2"), shared_model("gpt2")
    lock = threading.Lock()  # around what is right, on a model that no engine has
    steer = Intervention("steer", [Hook(N.POST_MLP, _steer, layers=0)])
    prompts = [[start, *IDS[start : start + 40]] for start in range(6)]
    wrong = []

    def work(engine, hooks):
        try:
            for prompt in prompts:
                (found,) = Recorder(engine, [N.POST_MLP, N.ATTN_PROBS], layers=1).run([prompt])
                logits = engine.get(prompt).logits
                with lock, torch.no_grad():
                    rows = expected(clean, prompt, N.POST_MLP, 1, hooks)
                    right = hooked(clean)(torch.tensor([prompt]), pctx=PrecomputeContext(clean.config, hooks)).logits
                if not close(found.tensor(N.POST_MLP, 1), rows):
                    wrong.append("rows")
                if not close(logits, right[0, -1]):
                    wrong.append("logits")
        except BaseException as error:  # noqa: BLE001 - for the main thread to see
            wrong.append(error)

    with PromptDB(store_path, chunk_tokens=8) as db:
        options = [{}, {"intervention": steer}, {"namespace": "other"}]
        engines = [Engine(db, model, shared_tokenizer(), **each) for each in options]
        threads = [
            threading.Thread(target=work, args=(engine, steer.hooks if engine.intervention else ()))
            for engine in engines
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        for engine in engines:
            engine.close()
        assert db.verify() == []


def test_what_a_pass_under_hooks_changes_for_itself_is_not_seen_by_other_threads():
    model = random_model("gpt2")
    own = model.config._attn_implementation
    runner, other = Runner(model), Runner(model)
    entered, leave = threading.Event(), threading.Event()

    def work():
        with runner.alone():
            model.config._attn_implementation = "eager"
            entered.set()
            leave.wait(10)
            model.config._attn_implementation = own

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    assert other.provenance()["attention"] == own != "eager"
    thread.join()


# Many prompts at once


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "qwen3_moe"])
def test_many_prompts_are_computed_as_one_tree(db, arch):
    model = shared_model(arch)
    prompts = [[*IDS[:12], number, *IDS[12 : 15 + number % 7]] for number in range(24)]
    points = [N.POST_MLP, N.QUERY_STATES, N.KEY_STATES, N.LOGITS, N.PRE_ATTN]
    with Engine(db, model, shared_tokenizer()) as engine:
        assert "packed" in engine._extender.runner.exact_ways
        counts, handle = passes(engine)
        recordings = Recorder(engine, points, layers=1).run(prompts)
        handle.remove()
        distinct = {tuple(prompt[: n + 1]) for prompt in prompts for n in range(len(prompt))}
        assert sum(counts) == len(distinct) == sum(each.tokens_computed for each in recordings)
        assert len(counts) <= 3
        for prompt, found in zip(prompts, recordings, strict=True):
            for point, layer in found.points:
                assert close(found.tensor(point, layer), expected(model, prompt, point, layer)), (point, layer)
        assert all(each.num_rows == len(distinct) for each in db.recorded())
        # They came with the spans: nothing is left to write when the spans are there.
        assert engine._extender.storer.beside is None
        assert db.verify() == []


def test_rows_are_those_of_the_pass_and_the_prompt_that_they_are_stored_with(db):
    """What is held in memory, and was not stored, is stored by a later prompt: without rows of some other pass."""
    model = shared_model("llama")
    with Engine(db, model, shared_tokenizer()) as engine:
        engine.get(IDS[:50], store=False)
        (held,) = Recorder(engine, N.POST_MLP, positions=slice(None)).run([IDS])
        assert close(held.tensor(N.POST_MLP, 1), expected(model, IDS, N.POST_MLP, 1))
        other = [5, *IDS[:40]]
        engine.get(other, store=False)
        for recording in Recorder(engine, N.POST_MLP).run([[*other, 1], [*other, 2], other[:20]]):
            ids = list(recording.token_ids)
            for layer in range(2):
                assert close(recording.tensor(N.POST_MLP, layer), expected(model, ids, N.POST_MLP, layer))
        # A span that somebody else stored in part meanwhile loses its rows, which are then computed.
        third = [6, *IDS[:40]]
        put = db.put_many

        def first_another(requests):
            db.put_many = put
            with Engine(db, model, shared_tokenizer(), write_behind=False) as second:
                second.put(third[:25])
            return put(requests)

        with Engine(db, model, shared_tokenizer(), write_behind=False) as late:
            late._extender.storer._db.put_many = first_another
            (found,) = Recorder(late, N.POST_MLP).run([third])
        for layer in range(2):
            assert close(found.tensor(N.POST_MLP, layer), expected(model, third, N.POST_MLP, layer))
        assert db.verify() == []


def test_an_error_leaves_no_hooks_and_what_came_before_stored(db):
    model = shared_model("llama")

    def prompts():
        yield IDS
        yield [3, *IDS]
        raise OSError("the file is gone")

    with Engine(db, model, shared_tokenizer()) as engine:
        runner = engine._extender.runner
        attach = runner.attach
        for positions in (None, [1, 2]):
            with pytest.raises(OSError, match="gone"):
                Recorder(engine, N.POST_MLP, positions=positions).run(prompts())
            with pytest.raises(TokenRangeError, match="100000"):
                Recorder(engine, N.POST_MLP, positions=positions).run([[7, *IDS], [100_000]])
            assert runner.attach is attach
            assert engine._extender.storer.beside is None
        for prompt in (IDS, [3, *IDS], [7, *IDS]):
            rows = db.activations(prompt, N.POST_MLP, 1)
            assert close(rows, expected(model, prompt, N.POST_MLP, 1))
        before = db.recorded()
        engine.put([8, *IDS])
        assert db.recorded() == before
        assert Recorder(engine, N.POST_MLP).run([]) == []
