"""Scores and probabilities of attention, recorded as ragged rows: against plain transformers with eager attention."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import TEXT, shared_model, shared_tokenizer

from promptdb import Engine, PromptDB
from promptdb.activations import Series, read_entry
from promptdb.blobs import TensorSpec, build_blob
from promptdb.demo_models import random_model
from promptdb.errors import CorruptDataError, InputTypeError, NotRecordedError
from promptdb.format import ACTIVATIONS, CHECKSUM_BYTES
from promptdb.hook_points import HookVariableNames as N
from promptdb.hooks import Hook, PrecomputeContext, hooked
from promptdb.keys import pack_tokens
from promptdb.recorder import Recorder

ARCHITECTURES = ("gpt2", "opt", "gpt_neox", "llama", "gemma2", "qwen3_moe")
SCORES = [N.PRE_MASK_ATTN_WEIGHTS, N.POST_MASK_ATTN_WEIGHTS, N.ATTN_PROBS]
IDS = list(TEXT.encode()[:60])


@pytest.fixture
def engine(db):
    with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        yield engine


def eager_probabilities(arch, ids):
    """Return what transformers itself returns, ``[layers, n, heads, N]``."""
    model = random_model(arch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    return torch.stack([each[0].transpose(0, 1) for each in found])


def shown(model, ids, point, layer):
    kept = []
    hook = Hook(point, lambda x, pctx: kept.append(x[0].transpose(0, 1).clone()), layers=layer)
    with torch.no_grad():
        hooked(model)(torch.tensor([ids]), pctx=PrecomputeContext(model.config, [hook]))
    return kept[0]


def as_read(whole, fill):
    """Return rows of one pass as they are read back: each ends at its own token."""
    later = torch.triu(torch.ones(whole.shape[0], whole.shape[2], dtype=torch.bool), 1)
    return whole.masked_fill(later[:, None], fill)


def close(a, b):
    """Where the mask put the lowest number there is, both have to have it."""
    low = torch.finfo(torch.float32).min / 2
    if a.shape != b.shape or not torch.equal(a < low, b < low):
        return False
    return torch.allclose(a.masked_fill(a < low, 0), b.masked_fill(b < low, 0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_probabilities_are_those_of_transformers(db, arch):
    expected = eager_probabilities(arch, IDS)
    model = shared_model(arch)
    own = model.config._attn_implementation
    with Engine(db, model, shared_tokenizer()) as engine:
        (found,) = Recorder(engine, N.ATTN_PROBS).run([IDS])
        for layer in range(2):
            assert close(found.tensor(N.ATTN_PROBS, layer), expected[layer])
            part = db.activations(IDS, N.ATTN_PROBS, layer, positions=[3, 40])
            assert close(part, expected[layer, [3, 40]])
        assert model.config._attn_implementation == own


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_scores_are_those_of_a_plain_pass_cold_after_a_hit_and_overlapping(arch):
    model = shared_model(arch)
    prompts = [IDS[:35], IDS, [*IDS[:20], 1, 2, 3, 4], [*IDS[:20], 1, 2, 9]]
    with PromptDB.in_memory(chunk_tokens=16) as db, Engine(db, model, shared_tokenizer()) as engine:
        engine.put(IDS[:47])
        recordings = Recorder(engine, SCORES).run(prompts)
        for prompt, recording in zip(prompts, recordings, strict=True):
            for point, fill in zip(SCORES, (-math.inf, -math.inf, 0), strict=True):
                for layer in range(2):
                    whole = as_read(shown(model, prompt, point, layer), fill)
                    assert close(recording.tensor(point, layer), whole), (point, layer)
            probs, scores = recording.tensor(N.ATTN_PROBS, 1), recording.tensor(N.POST_MASK_ATTN_WEIGHTS, 1)
            assert torch.allclose(scores.softmax(-1), probs, atol=1e-6)
        distinct = {tuple(prompt[: n + 1]) for prompt in prompts for n in range(len(prompt))}
        heads = model.config.num_attention_heads
        for found in db.recorded():
            assert found.num_rows == len(distinct)
            assert found.row_shape == (heads, -1)
            data = 4 * heads * sum(map(len, distinct))
            assert data <= found.size_bytes < data + found.num_spans * 400
        assert all(each.tokens_computed == 0 for each in Recorder(engine, SCORES).run(prompts))
        assert db.verify() == []


def test_windowed_layers_have_whole_rows(db):
    model = shared_model("mistral")
    assert model.config.sliding_window == 16 < len(IDS)
    with Engine(db, model, shared_tokenizer()) as engine:
        (found,) = Recorder(engine, SCORES).run([IDS])
    far = torch.tril(torch.ones(60, 60, dtype=torch.bool), -16)[:, None].expand(
        60, model.config.num_attention_heads, 60
    )
    before, after, probs = (found.tensor(point, 0) for point in SCORES)
    assert before[far].isfinite().all()  # as computed, before anything is hidden
    assert before[far].abs().max() < 1e3
    assert (after[far] < -1e38).all()
    assert (probs[far] == 0).all()
    assert torch.allclose(probs.sum(-1), torch.ones(()), atol=1e-5)
    # In half precision what a mask hides is minus infinity, and nothing else may be.
    with Engine(db, model, shared_tokenizer()) as engine:
        (half,) = Recorder(engine, SCORES, dtype="float16").run([IDS])
    assert (half.tensor(N.POST_MASK_ATTN_WEIGHTS, 0)[far] == -math.inf).all()


def test_keys_and_values_are_those_of_the_models_own_attention(db):
    model = shared_model("llama")
    seen = []
    with Engine(db, model, shared_tokenizer()) as engine:
        attach = engine._extender.runner.attach
        step = engine._extender.runner.step
        engine._extender.runner.step = lambda *args: (seen.append(args[2:]), step(*args))[1]
        (found,) = Recorder(engine, [N.ATTN_PROBS, N.POST_MLP], layers=0).run([IDS])
        assert found.tokens_computed == 2 * len(IDS)
        assert seen == [(0, 60)]  # the pass for the probabilities alone
        kv = engine.get(IDS).past_key_values()
        assert engine._extender.runner.attach is attach
    with torch.no_grad():
        plain = model(torch.tensor([IDS]), use_cache=True).past_key_values
    for ours, theirs in zip(kv.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_positions_join_and_long_prompts_go_in_several_passes(engine, db):
    ids = (IDS * 5)[:270]
    whole = as_read(shown(engine.model, ids, N.ATTN_PROBS, 1), 0)
    Recorder(engine, N.ATTN_PROBS, layers=1, positions=[3, 40, -1]).run([ids])
    read = db.activations(ids, N.ATTN_PROBS, 1, positions=[3, 40, -1])
    assert read.shape == (3, engine.model.config.num_attention_heads, 270)
    assert close(read, whole[[3, 40, 269]])
    with pytest.raises(NotRecordedError, match="267 of 270"):
        db.activations(ids, N.ATTN_PROBS, 1)
    (found,) = Recorder(engine, N.ATTN_PROBS, layers=1).run([ids])
    assert close(found.tensor(N.ATTN_PROBS, 1), whole)
    assert close(db.activations(ids[:30], N.ATTN_PROBS, 1, positions=slice(5, 9)), whole[5:9, :, :30])
    assert db.recorded()[0].num_rows == 270
    assert db.verify() == []


def test_rows_of_several_lengths_are_no_table(engine, db):
    Recorder(engine, N.ATTN_PROBS, layers=0).run([IDS])
    with pytest.raises(InputTypeError, match="do not fit into one table"):
        db.activation_dataset(N.ATTN_PROBS, 0)
    with pytest.raises(InputTypeError, match="do not fit into one table"):
        db.recorded_spans(N.ATTN_PROBS, 0)
    with pytest.raises(InputTypeError, match="no common size"):
        db.activation_norms(IDS, N.ATTN_PROBS)


def entry_blob(num_items, offsets=None, lengths=None, dtype="F32"):
    tensors = [(TensorSpec("rows", dtype, (num_items,)), bytes(4 * num_items))]
    for name, numbers in (("offsets", offsets), ("lengths", lengths)):
        if numbers is not None:
            tensors.append((TensorSpec(name, "U32", (len(numbers),)), pack_tokens(numbers)))
    return build_blob(tensors)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (entry_blob(12, None, [1, 3]), "not as long as the text"),
        (entry_blob(12, [1], [1]), "not as long as the text"),
        (entry_blob(12, [0, 2], [1, 2]), "not as long as the text"),
        (entry_blob(13, None, [5, 6]), "other lengths"),
        (entry_blob(12, [0], [1, 2]), "for other rows"),
        (entry_blob(12, None, []), "no list"),
        (entry_blob(12, None, [0, 1]), "not as long as the text"),
    ],
)
def test_rows_of_impossible_lengths_are_refused(blob, reason):
    with pytest.raises(CorruptDataError, match=reason):
        read_entry(blob)


def test_rows_under_another_place_are_refused(engine, db):
    Recorder(engine, [N.ATTN_PROBS, N.POST_MLP], layers=0).run([IDS])
    probs, rows = Series(N.ATTN_PROBS, 0, "F32"), Series(N.POST_MLP, 0, "F32")
    node = engine.lookup(IDS).steps[-1].node

    def put(blob_series, key_series, lengths=None):
        def work(writer):
            from promptdb.activations import pack_entry

            blob = bytes(writer.get(ACTIVATIONS, blob_series.key(node)))[CHECKSUM_BYTES:]
            if lengths is not None:
                blob = entry_blob(4 * sum(lengths), None, lengths)
            writer.put(ACTIVATIONS, key_series.key(node), pack_entry(key_series.key(node), blob))

        db._index.transact(work)

    put(probs, probs, lengths=[7])  # of a span that begins at 6: this one begins at 0
    with pytest.raises(CorruptDataError, match="not those of the span"):
        db.activations(IDS, N.ATTN_PROBS, 0)
    put(rows, probs)
    with pytest.raises(CorruptDataError, match="not those of the span"):
        db.activations(IDS, N.ATTN_PROBS, 0)
    assert ACTIVATIONS in [each.table for each in db.verify()]
    (again,) = Recorder(engine, N.ATTN_PROBS, layers=0).run([IDS])
    whole = as_read(shown(engine.model, IDS, N.ATTN_PROBS, 0), 0)
    assert close(again.tensor(N.ATTN_PROBS, 0), whole)
    put(probs, probs, lengths=[7])
    assert close(Recorder(engine, N.ATTN_PROBS, layers=0).run([IDS])[0].tensor(N.ATTN_PROBS, 0), whole)
    db.verify(fix=True)  # the accounting, after what was written past it
    assert db.verify() == []
