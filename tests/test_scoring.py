"""Scores of continuations and classification, against plain forward passes."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import shared_model, shared_tokenizer

from promptdb import Engine, PromptDB, Text
from promptdb.errors import EmptyPromptError, InputTypeError
from promptdb.text import run

CONTEXTS = ["The quick brown fox", "Naïve café: 你好", "Hello there.\n"]
CHOICES = [" jumps", " over the lazy dog", "🙂", "\n"]


def oracle(model, before, after):
    """Log-probabilities of ``after`` given ``before``, and whether each is the most likely token."""
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(before) - 1 : -1]
    logprobs = rows.gather(1, torch.tensor(after)[:, None])[:, 0]
    return logprobs, bool((rows.argmax(-1) == torch.tensor(after)).all())


def test_scores_of_pairs(db):
    model, tokenizer = shared_model("gpt2"), shared_tokenizer()
    pairs = [(context, choice) for context in CONTEXTS for choice in CHOICES]
    with Engine(db, model, tokenizer) as engine:
        for _ in range(2):
            computed = 0
            for (context, choice), score in zip(pairs, engine.score(pairs), strict=True):
                whole = tokenizer(context + choice).input_ids
                before = whole[: score.num_context_tokens]
                assert tokenizer.decode([*before, *score.token_ids]) == context + choice
                # Whole tokens before the end of the context, and not one fewer.
                assert len(tokenizer.decode(before).rstrip("�")) <= len(context)
                logprobs, greedy = oracle(model, before, list(score.token_ids))
                torch.testing.assert_close(score.token_logprobs.double(), logprobs, rtol=0, atol=1e-5)
                assert score.logprob == pytest.approx(float(logprobs.sum()), abs=1e-4)
                assert score.is_greedy == greedy
                computed += score.tokens_computed
            distinct = {
                tuple(ids[:n]) for c, d in pairs for ids in [tokenizer(c + d).input_ids] for n in range(1, len(ids) + 1)
            }
            assert computed == (len(distinct) if _ == 0 else 0)


def test_scores_of_token_ids_and_of_greedy_ones(db):
    model = shared_model("llama")
    context = [5, 6, 7]
    with torch.no_grad():
        greedy = model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False)[0, 3:].tolist()
    with Engine(db, model, shared_tokenizer()) as engine:
        first, second = engine.score([(context, greedy), (tuple(context), [greedy[0], greedy[1] + 1])])
        assert first.is_greedy is True
        assert second.is_greedy is False
        assert first.num_context_tokens == second.num_context_tokens == 3
        again, _ = engine.score([(context, greedy), (context, [1])])
        assert (again.is_greedy, again.tokens_computed) == (True, 0)


def test_scoring_stores_no_logits_of_ends_that_nobody_asked_for(db):
    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6])]
    with Engine(db, shared_model("gpt2"), shared_tokenizer()) as engine:
        list(engine.score(pairs))
        engine.flush()
        # Those after the context only, on which both continuations stand.
        assert db.stat()["num_logits"] == 1
        assert sum(score.tokens_computed for score in engine.score(pairs)) == 0
        assert engine.get([1, 2, 3, 4, 5]).tokens_computed == 1


@pytest.mark.parametrize("normalization", ["none", "tokens", "bytes"])
def test_classification(db, normalization):
    model, tokenizer = shared_model("gpt2"), shared_tokenizer()
    prior = {" jumps": 3.0, " over the lazy dog": 1.0, "🙂": 2.0, "\n": 0.5}
    with Engine(db, model, tokenizer) as engine:
        found = list(engine.classify_many(CONTEXTS, CHOICES, prior, normalization=normalization))
        assert len(found) == len(CONTEXTS)
        for context, result in zip(CONTEXTS, found, strict=True):
            weights = []
            for choice in CHOICES:
                (score,) = engine.score([(context, choice)])
                length = {"none": 1, "tokens": len(score.token_ids), "bytes": len(choice.encode())}[normalization]
                whole = tokenizer(context + choice).input_ids
                logprobs, _ = oracle(model, whole[: score.num_context_tokens], whole[score.num_context_tokens :])
                weights.append(math.exp(float(logprobs.sum()) / length) * prior[choice])
            expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
            torch.testing.assert_close(result.probabilities, expected, rtol=1e-4, atol=1e-9)
            assert result.best == CHOICES[int(expected.argmax())]
        one = engine.classify(CONTEXTS[0], CHOICES, [prior[choice] for choice in CHOICES], normalization=normalization)
        torch.testing.assert_close(one.probabilities, found[0].probabilities)


def test_wrong_input_is_named(db):
    with Engine(db, shared_model("gpt2"), shared_tokenizer()) as engine:
        for items, kind, message in [
            (["just text"], InputTypeError, "pair"),
            ([("a", [1])], InputTypeError, "both"),
            ([("", "b")], EmptyPromptError, "context"),
            ([("a", "")], EmptyPromptError, "continuation"),
            ([([], [1])], EmptyPromptError, "context"),
            ([([1], [])], EmptyPromptError, "continuation"),
            ([(b"a", b"b")], InputTypeError, "bytes"),
            ([([True], [False])], InputTypeError, "boolean"),
            ([({1, 2}, {3})], InputTypeError, "set"),
            ([({1: 2}, {3: 4})], InputTypeError, "tokenizer's output"),
            ([(None, [1])], InputTypeError, "NoneType"),
            ("ab", InputTypeError, "iterable of pairs"),
            (None, InputTypeError, "iterable of pairs"),
        ]:
            with pytest.raises(kind, match=message):
                list(engine.score(items))
        for choices, prior, message in [
            ("yes", None, "sequence"),
            ([], None, "one or more"),
            (["a", "a"], None, "different"),
            (["a", "b"], [1], "positive"),
            (["a", "b"], [1, 0], "positive"),
            (["a", "b"], {"a": 1}, "prior"),
        ]:
            with pytest.raises(InputTypeError, match=message):
                engine.classify("context", choices, prior)
        with pytest.raises(InputTypeError, match="normalization"):
            engine.classify("context", ["a", "b"], normalization="words")


def test_texts_run_as_one_batch(db):
    model, tokenizer = shared_model("gpt2"), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        context = Text("Hello there.", engine)
        texts = [context + choice + ending for choice in (" One", " Two") for ending in (".", "!")]
        everything = [*texts, Text("alone", (model, tokenizer)), Text("all of it", engine, logits="all")]
        assert run(everything) == everything
        for text in everything:
            ids = tokenizer(text.string).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits
            encoding, output = text.model_repr
            assert encoding.input_ids.tolist() == [ids]
            torch.testing.assert_close(output.logits[:, -1], logits[:, -1], rtol=0, atol=1e-5)
        distinct = {tuple(tokenizer(t.string).input_ids[:n]) for t in texts for n in range(1, 40)}
        assert sum(text.representation.tokens_computed for text in texts) == len(distinct)


def test_generating_for_many(tmp_path):
    model, tokenizer = shared_model("qwen3"), shared_tokenizer()
    prompts = ["Hello there. General", "Hello there. Captain", "Hello", "你好"]
    with PromptDB(tmp_path / "store") as db, Engine(db, model, tokenizer) as engine:
        for prompt, output in zip(
            prompts, engine.generate_many(prompts, max_new_tokens=6, do_sample=False), strict=True
        ):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            assert torch.equal(output, model.generate(ids, max_new_tokens=6, do_sample=False))
