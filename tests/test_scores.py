"""Log-probabilities and most probable tokens: against plain forward passes, and stores that do not have them."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEXT, shared_model, shared_tokenizer

from promptdb import Engine, PromptDB, storer
from promptdb.blobs import TensorSpec, build_blob, parse_blob
from promptdb.format import KV_BLOB, LOGPROBS_BLOB
from promptdb.keys import Root
from promptdb.kv import KvSource, encode_span, load_scores, trim_blobs
from promptdb.scores import TokenScores, token_scores

ARCHITECTURES = ("gpt2", "llama", "mistral", "gemma3_text", "falcon", "bloom", "qwen3_moe")
OLD_STORE = Path(__file__).parent / "data" / "store-v1"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def scores_of(*logprobs_and_ids):
    logprobs, greedy_ids = zip(*logprobs_and_ids, strict=True)
    return TokenScores(torch.tensor(logprobs), torch.tensor(greedy_ids, dtype=torch.int32))


class TestTokenScores:
    def test_nothing_is_known_at_first(self):
        scores = TokenScores.unknown(3)
        assert len(scores) == 3
        assert scores.logprobs.isnan().all()
        assert scores.logprobs.dtype == torch.float32
        assert scores.greedy_ids.tolist() == [-1, -1, -1]
        assert scores.greedy_ids.dtype == torch.int32
        assert len(TokenScores.unknown(0)) == 0

    def test_slices_share_memory_and_copies_do_not(self):
        scores = scores_of((-1.0, 7), (-2.0, 8), (-3.0, 9))
        copy = scores.clone()
        part = scores[1:]
        assert (part.logprobs.tolist(), part.greedy_ids.tolist()) == ([-2.0, -3.0], [8, 9])
        part[:1] = scores_of((-5.0, 5))
        assert (scores.logprobs.tolist(), scores.greedy_ids.tolist()) == ([-1.0, -5.0, -3.0], [7, 5, 9])
        assert (copy.logprobs.tolist(), copy.greedy_ids.tolist()) == ([-1.0, -2.0, -3.0], [7, 8, 9])

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_what_does_not_fit_is_not_written(self, count):
        scores = TokenScores.unknown(4)
        with pytest.raises(ValueError, match=f"{count} scores for 2 tokens"):
            scores[1:3] = TokenScores(torch.zeros(count), torch.zeros(count, dtype=torch.int32))
        assert scores.greedy_ids.tolist() == [-1] * 4

    @pytest.mark.parametrize(
        ("logprobs", "greedy_ids"),
        [
            (torch.zeros(3), torch.zeros(2, dtype=torch.int32)),
            (torch.zeros(3), torch.zeros(3, dtype=torch.int64)),
            (torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int32)),
            (torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int32)),
        ],
    )
    def test_other_shapes_and_dtypes_are_refused(self, logprobs, greedy_ids):
        with pytest.raises(ValueError, match="scores of"):
            TokenScores(logprobs, greedy_ids)


def plain_scores(rows, targets):
    """Row by row in Python floats: log-probabilities, and the first of the largest."""
    logprobs, greedy_ids = [], []
    for row, target in zip(rows.double().tolist(), targets.tolist(), strict=True):
        highest = max(row)
        logprobs.append(row[target] - highest - math.log(math.fsum(math.exp(each - highest) for each in row)))
        greedy_ids.append(row.index(highest))
    return torch.tensor(logprobs), greedy_ids


def by_torch(logits, targets):
    """In single precision."""
    rows = logits.float()
    return rows.gather(1, targets[:, None])[:, 0] - rows.logsumexp(1)


class TestFromLogits:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", [1, 7, 8, 21])
    def test_every_row(self, dtype, count):
        generator = torch.Generator().manual_seed(count)
        # Half precision has many ties.
        logits = (torch.randn(count + 2, 999, generator=generator) * 4).to(dtype)
        targets = torch.randint(0, 999, (count,), generator=generator)
        found = token_scores(logits, targets)
        logprobs, greedy_ids = plain_scores(logits[:count], targets)
        torch.testing.assert_close(found.logprobs, logprobs, rtol=0, atol=4e-6)
        assert found.greedy_ids.tolist() == greedy_ids
        torch.testing.assert_close(found.logprobs, by_torch(logits[:count], targets), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("level", [-3e4, -100.0, -61.0, -59.0, 59.0, 61.0, 100.0, 3e4])
    def test_logits_of_any_size(self, level, dtype):
        """What exp would make infinite, or nothing, beside rows that it would not: each row is computed by itself."""
        logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
        logits[::3] += level
        logits = logits.to(dtype)
        targets = torch.arange(64) * 4
        found = token_scores(logits, targets)
        expected = torch.log_softmax(logits.double(), 1).gather(1, targets[:, None])[:, 0]
        one_ulp = torch.finfo(torch.float32).eps * 60
        torch.testing.assert_close(found.logprobs, expected.float(), rtol=1e-6, atol=one_ulp)
        alone = torch.cat([token_scores(logits[at : at + 1], targets[at : at + 1]).logprobs for at in range(64)])
        torch.testing.assert_close(found.logprobs, alone, rtol=1e-6, atol=1e-6)

    def test_any_rows_in_any_order(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(40, 77, generator=generator)
        rows = torch.randint(0, 40, (100,), generator=generator)
        targets = torch.randint(0, 77, (100,), generator=generator)
        found = token_scores(logits, targets, rows)
        logprobs, greedy_ids = plain_scores(logits[rows], targets)
        torch.testing.assert_close(found.logprobs, logprobs, rtol=0, atol=2e-6)
        assert found.greedy_ids.tolist() == greedy_ids

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_equal_ones_the_first_is_the_greedy_one(self, dtype):
        logits = torch.zeros(20, 300, dtype=dtype)
        for row in range(1, 20):
            logits[row, 13 * row :: 17] = 2.5
        found = token_scores(logits, torch.zeros(20, dtype=torch.int64))
        assert found.greedy_ids.tolist() == [0, *(13 * row for row in range(1, 20))]

    def test_doubles_that_are_one_single(self):
        logits = torch.zeros(1, 4, dtype=torch.float64)
        logits[0, 2] = 1e-12
        assert token_scores(logits, torch.tensor([0])).greedy_ids.tolist() == [2]

    def test_masked_tokens_are_minus_infinity(self):
        logits = torch.randn(3, 50)
        logits[:, ::2] = -math.inf
        targets = torch.tensor([1, 2, 3])
        found = token_scores(logits, targets)
        assert found.logprobs[1] == -math.inf
        torch.testing.assert_close(found.logprobs, torch.log_softmax(logits, 1)[range(3), targets])
        assert found.greedy_ids.tolist() == logits.argmax(1).tolist()

    def test_rows_of_which_nothing_can_be_told(self):
        logits = torch.randn(12, 50)
        logits[2, 7] = math.nan
        logits[5] = -math.inf
        logits[9, 3] = math.inf
        logits[10, 4] = math.inf
        targets = torch.full((12,), 3)
        logprobs = token_scores(logits, targets).logprobs
        assert logprobs.isnan().nonzero()[:, 0].tolist() == [2, 5, 9]
        assert logprobs[10] == -math.inf
        torch.testing.assert_close(logprobs, by_torch(logits, targets), equal_nan=True)

    def test_what_a_caller_may_pass(self):
        logits = torch.randn(6, 50, requires_grad=True)
        assert len(token_scores(logits, torch.empty(0, dtype=torch.int64))) == 0
        empty = torch.empty(0, dtype=torch.int64)
        assert len(token_scores(logits, empty, empty)) == 0
        padded = logits[:, :40]  # rows apart
        found = token_scores(padded, torch.zeros(6, dtype=torch.int64))
        assert found.greedy_ids.tolist() == padded.argmax(1).tolist()
        assert not found.logprobs.requires_grad
        with pytest.raises((RuntimeError, IndexError)):
            token_scores(logits, torch.zeros(7, dtype=torch.int64))

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_on_a_device(self, dtype):
        logits = (torch.randn(700, 5000) * 4).to(dtype)
        targets, rows = torch.randint(0, 5000, (600,)), torch.randint(0, 700, (600,))
        for these in (None, rows):
            on_cpu, found = token_scores(logits, targets, these), token_scores(logits.cuda(), targets, these)
            assert (found.logprobs.device.type, found.greedy_ids.device.type) == ("cpu", "cpu")
            torch.testing.assert_close(found.logprobs, on_cpu.logprobs, rtol=0, atol=1e-5)
            assert torch.equal(found.greedy_ids, on_cpu.greedy_ids)


def reference(model, token_ids):
    """Most probable tokens after each token but the last, by a plain pass, and where that is beyond rounding."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    best = logits.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2e-5
    assert int((~sure).sum()) <= len(sure) // 10
    return logits.argmax(-1).int(), sure


def assert_greedy(representation, model):
    expected, sure = reference(model, list(representation.token_ids))
    assert representation.greedy_ids.dtype == torch.int32
    assert representation.greedy_ids.shape == representation.token_logprobs.shape
    assert torch.equal(representation.greedy_ids[sure], expected[sure])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("chunk_tokens", [7, 256])
def test_any_way_of_storing_and_extending(arch, chunk_tokens, tmp_path):
    model, tokenizer = shared_model(arch), shared_tokenizer()
    ids = tokenizer(TEXT).input_ids
    path = tmp_path / "store"
    for end in (1, 2, 23, 61):
        with PromptDB(path, chunk_tokens=chunk_tokens) as db, Engine(db, model, tokenizer) as engine:
            assert_greedy(engine.get(ids[:end]), model)
    with PromptDB(path) as db, Engine(db, model, tokenizer) as engine:
        inside = engine.get([*ids[:40], 5, 6, 7])  # parts from a span in its middle
        assert 39 <= inside.tokens_loaded <= 40
        assert_greedy(inside, model)
        assert_greedy(engine.get([*ids[:40], 5, 6, 7, 8, 9]), model)  # goes on from memory
        assert_greedy(engine.get(ids), model)
    with PromptDB(path, verify_reads="always") as db, Engine(db, model, tokenizer) as engine:
        for prompt in (ids, [*ids[:40], 5, 6, 7], ids[:61]):
            hit = engine.get(prompt)
            assert hit.tokens_computed == 0
            assert_greedy(hit, model)
        assert torch.equal(engine.get(ids, logits="all").greedy_ids, engine.get(ids).greedy_ids)
        assert db.verify() == []


def test_a_greedy_continuation_is_told_from_the_store_alone(db):
    model, tokenizer = shared_model("gpt2"), shared_tokenizer()
    context = tokenizer("Hello there.").input_ids
    with torch.no_grad():
        whole = model.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False)[0].tolist()
    with Engine(db, model, tokenizer) as engine:
        engine.get(whole)
    with Engine(db, model, tokenizer) as engine:
        hit = engine.get(whole)
    assert hit.tokens_computed == 0
    new = len(whole) - len(context)
    assert hit.greedy_ids[-new:].tolist() == whole[-new:]


def test_what_a_caller_does_to_a_result_reaches_nobody_else(db):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        for computed in (True, False, False):
            got = engine.get(TEXT, store=False)
            assert (got.tokens_computed > 0) == computed
            assert_greedy(got, model)
            got.greedy_ids.fill_(3)
        longer = engine.get(TEXT + "And more.", store=False)
        assert_greedy(longer, model)


def test_spans_lose_their_first_tokens_together(db):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        cache = engine.get(TEXT).past_key_values()
    scores = scores_of(*((-float(at), at + 100) for at in range(10)))
    whole = encode_span(KvSource(cache), 20, 30, scores)
    expected = encode_span(KvSource(cache), 23, 30, scores[3:])
    trimmed = trim_blobs(whole, 3)
    assert {kind: bytes(blob) for kind, blob in trimmed.items()} == {
        kind: bytes(blob) for kind, blob in expected.items()
    }
    assert parse_blob(trimmed[LOGPROBS_BLOB])["greedy_ids"].shape == (7,)


# Stores that others wrote


def store_with(monkeypatch, change, start=None):
    """Have score blobs written with other tensors: all of them, or those of spans that start at ``start``."""

    def encode(source, first, end, scores, kv_codec):
        blobs = encode_span(source, first, end, scores, kv_codec)
        if start in (None, first):
            tensors = {
                name: (TensorSpec(name, view.dtype, view.shape), bytes(view.data))
                for name, view in parse_blob(blobs[LOGPROBS_BLOB]).items()
            }
            change(tensors, end - first)
            blobs[LOGPROBS_BLOB] = build_blob(list(tensors.values()))
        assert set(blobs) == {KV_BLOB, LOGPROBS_BLOB}
        return blobs

    monkeypatch.setattr(storer, "encode_span", encode)


def test_the_old_store_has_none(tmp_path):
    path = shutil.copytree(OLD_STORE, tmp_path / "store")
    root = Root("a1" * 32, "b2" * 32)
    with PromptDB(path, readonly=True) as db:
        match = db.lookup([*range(100, 138), 2**32 - 1, 0], model=root.weights_id, tokenizer=root.tokenizer_id)
        with db.read() as snapshot:
            scores = load_scores(snapshot, match, 40)
    assert scores.greedy_ids.tolist() == [-1] * 40
    assert scores.logprobs[1:].tolist() == [-position / 4 for position in range(1, 40)]
    assert scores.logprobs[0].isnan()


def test_an_old_store_is_read_and_extended(db, tokenizer, monkeypatch):
    model = shared_model("llama")
    ids = tokenizer(TEXT).input_ids
    with monkeypatch.context() as patched:
        store_with(patched, lambda tensors, _: tensors.pop("greedy_ids"))
        with Engine(db, model, tokenizer) as engine:
            expected = engine.get(ids[:50])
            assert_greedy(expected, model)
    with Engine(db, model, tokenizer) as engine:
        hit = engine.get(ids[:50])
        assert (hit.tokens_computed, hit.greedy_ids.tolist()) == (0, [-1] * 49)
        assert torch.equal(hit.token_logprobs, expected.token_logprobs)
        computed = engine.get(ids)
    with Engine(db, model, tokenizer) as engine:
        stored = engine.get(ids)
        inside = engine.get([*ids[:20], 9, 9])
    for got, old in ((computed, 50), (stored, 50), (inside, 20)):
        assert got.greedy_ids[: old - 1].tolist() == [-1] * (old - 1)
        greedy_ids, sure = reference(model, list(got.token_ids))
        assert torch.equal(got.greedy_ids[old - 1 :][sure[old - 1 :]], greedy_ids[old - 1 :][sure[old - 1 :]])
    assert (stored.tokens_computed, computed.tokens_loaded, inside.tokens_loaded) == (0, 50, 19)


def test_tensors_of_later_versions_are_ignored(db, tokenizer, monkeypatch):
    model = shared_model("llama")

    def add(tensors, count):
        tensors["entropy"] = (TensorSpec("entropy", "F64", (count, 2)), bytes(16 * count))

    with monkeypatch.context() as patched:
        store_with(patched, add)
        with Engine(db, model, tokenizer) as engine:
            engine.get(TEXT)
    with Engine(db, model, tokenizer) as engine:
        hit = engine.get(TEXT)
        assert hit.tokens_computed == 0
        assert_greedy(hit, model)


WRONG = {
    "dtype": lambda count: (TensorSpec("greedy_ids", "U32", (count,)), bytes(4 * count)),
    "floats": lambda count: (TensorSpec("greedy_ids", "F32", (count,)), bytes(4 * count)),
    "wide": lambda count: (TensorSpec("greedy_ids", "I64", (count,)), bytes(8 * count)),
    "short": lambda count: (TensorSpec("greedy_ids", "I32", (count - 1,)), bytes(4 * count - 4)),
    "long": lambda count: (TensorSpec("greedy_ids", "I32", (count + 1,)), bytes(4 * count + 4)),
    "empty": lambda count: (TensorSpec("greedy_ids", "I32", (0,)), b""),
    "rank": lambda count: (TensorSpec("greedy_ids", "I32", (1, count)), bytes(4 * count)),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("longer", [False, True])
def test_damage_is_a_miss_is_logged_and_heals(db, tokenizer, monkeypatch, caplog, wrong, longer):
    model = shared_model("llama")
    ids = tokenizer(TEXT).input_ids
    with monkeypatch.context() as patched:
        store_with(patched, lambda tensors, count: tensors.update(greedy_ids=WRONG[wrong](count)), start=16)
        with Engine(db, model, tokenizer) as engine:
            engine.get(ids)
    asked = [*ids, 7] if longer else ids
    with Engine(db, model, tokenizer) as engine:
        with caplog.at_level(logging.WARNING, logger="promptdb"):
            got = engine.get(asked)
        assert "greedy_ids" in caplog.text
        assert "computed again" in caplog.text
        assert got.tokens_computed > 0
        assert_greedy(got, model)
    caplog.clear()
    with Engine(db, model, tokenizer) as engine:
        again = engine.get(asked)
        assert again.tokens_computed == 0
        assert torch.equal(again.greedy_ids, got.greedy_ids)
        assert not caplog.text
