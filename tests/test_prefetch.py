"""What the next prompts lack is fetched while the model computes: sooner, with the same results, and never too much."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from conftest import shared_model, shared_tokenizer
from far_servers import needs_redis, proxy_to, redis_server

from promptdb import Engine, PromptDB
from promptdb.batch import BatchLimits
from promptdb.errors import EmptyPromptError, SharedError
from promptdb.prefetch import Prefetch, with_next
from promptdb.shared_options import SharedOptions

# Windows of some prompts each; of every prompt the first half lies afar, and the other is to be computed.
LIMITS = BatchLimits(window_tokens=500, pass_tokens=128)
KNOWN = [
    f"{number:03d} what one machine has computed lies afar, and another one does not compute it. " * 2
    for number in range(20)
]
PROMPTS = [f"{text} And this is new, number {number}." for number, text in enumerate(KNOWN)]


def opened(path, url, **options):
    db = PromptDB(path, chunk_tokens=32, shared=SharedOptions(url, **options))
    return db, Engine(db, shared_model("llama"), shared_tokenizer())


@pytest.fixture
def far(tmp_path):
    """Yield a server that holds the first halves."""
    with redis_server(tmp_path / "redis") as server:
        db, engine = opened(tmp_path / "one", server.url)
        with db, engine:
            for _ in engine.run(KNOWN):
                pass
            engine.flush()
            assert db.tier.flush(30)
        yield server


def forget_rates(engine):
    """Let everything be fetched: so small a model would rather compute these few tokens."""
    engine._extender.cost.rates.clear()
    engine._extender.cost.computed = lambda num_tokens, seconds: None


def check(results, prompts):
    model = shared_model("llama")
    for found, prompt in zip(results, prompts, strict=True):
        ids = torch.tensor([shared_tokenizer()(prompt)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0]
        torch.testing.assert_close(found.logits, logits[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@needs_redis()
def test_fetching_hides_behind_computing(tmp_path, far, monkeypatch):
    """Over a slow link, the whole takes less time than fetching and computing one after the other."""
    seconds = {}
    with proxy_to(far.port) as proxy:
        for name in ("ahead", "in turn"):
            db, engine = opened(tmp_path / name, f"redis://127.0.0.1:{proxy.port}", lease_s=0)
            with db, engine:
                forget_rates(engine)
                engine._extender.tier.calls.far.facts()  # connected
                if name == "in turn":
                    monkeypatch.setattr(Prefetch, "begin", lambda self, root, prompts: None)
                proxy.delay_s = 0.05
                began = time.monotonic()
                results = list(engine.run(PROMPTS, limits=LIMITS, on_progress=lambda progress: time.sleep(0.25)))
                seconds[name] = time.monotonic() - began
                proxy.delay_s = 0.0
                check(results, PROMPTS)
                computed = sum(found.tokens_computed for found in results)
                total = sum(found.num_tokens for found in results)
                assert sum(found.tokens_loaded for found in results) == total - computed
                assert computed < 0.3 * total
                assert db.tier.calls.counts.tokens_fetched > 1000
    assert seconds["ahead"] < 0.9 * seconds["in turn"], seconds


@needs_redis()
def test_scores_and_pieces(tmp_path, far):
    db, engine = opened(tmp_path / "two", far.url)
    with db, engine:
        forget_rates(engine)
        pairs = list(zip(KNOWN, [" One end."] * len(KNOWN), strict=True))
        ahead = [found.logprob for found in engine.score(pairs, limits=LIMITS)]
        assert db.tier.calls.counts.tokens_fetched > 1000
    with PromptDB(tmp_path / "three", shared="none") as db, Engine(db, engine.model, engine.tokenizer) as alone:
        plain = [found.logprob for found in alone.score(pairs)]
    assert ahead == pytest.approx(plain, abs=1e-4)


@needs_redis()
def test_no_more_than_a_window_is_taken_ahead(tmp_path, far):
    """Prompts are taken when they are needed, and threads end with the batch, also if nobody takes its end."""
    db, engine = opened(tmp_path / "two", far.url)
    taken = []
    with db, engine:
        results = engine.run((taken.append(prompt) or prompt for prompt in PROMPTS), limits=LIMITS)
        next(results)
        per_window = -(-500 // len(shared_tokenizer()(PROMPTS[0])["input_ids"]))
        assert len(taken) <= 2 * (per_window + 1)  # what they share counts once
        results.close()
        assert not [each for each in threading.enumerate() if each.name.startswith("promptdb-prefetch")]
        check(engine.run(PROMPTS, limits=LIMITS), PROMPTS)


@needs_redis()
def test_what_is_wrong_with_a_prompt_ahead(tmp_path, far):
    """It is told when its turn has come: what stands before it has its results."""
    db, engine = opened(tmp_path / "two", far.url)
    with db, engine:
        results = engine.run([*PROMPTS, ""], limits=LIMITS)
        found = [next(results) for _ in PROMPTS]
        with pytest.raises(EmptyPromptError, match="prompt 21"):
            next(results)
    check(found, PROMPTS)


@needs_redis()
@pytest.mark.parametrize("is_required", [False, True])
def test_a_far_side_that_dies_meanwhile(tmp_path, far, is_required):
    options = {"timeout_s": 0.3, "connect_timeout_s": 0.3, "required": is_required}
    db, engine = opened(tmp_path / "two", far.url, **options)
    with db, engine:
        forget_rates(engine)
        results = engine.run(PROMPTS, limits=LIMITS)
        found = [next(results)]
        far.kill()
        if is_required:
            with pytest.raises(SharedError):
                list(results)
            return
        found += results
    check(found, PROMPTS)


@needs_redis()
def test_a_store_that_is_closed_meanwhile(tmp_path, far):
    """What is under way is given up: nothing hangs, nothing is raised that nobody waits for, and the store is sound."""
    with proxy_to(far.port) as proxy:
        db, engine = opened(tmp_path / "two", f"redis://127.0.0.1:{proxy.port}", lease_s=0)
        with db, engine:
            forget_rates(engine)
            results = engine.run(PROMPTS, limits=LIMITS)
            next(results)
            proxy.delay_s = 0.2
            for _ in range(5):  # the next window
                next(results)
            began = time.monotonic()
        assert time.monotonic() - began < 10
        results.close()
        assert time.monotonic() - began < 15
    with PromptDB(tmp_path / "two", shared="none") as db:
        assert db.verify() == []


def test_pairs_of_items():
    assert list(with_next(iter([]))) == []
    assert list(with_next(iter([[1], [2], [3]]))) == [([1], [2]), ([2], [3]), ([3], None)]

    def broken():
        yield [1]
        raise ValueError("broken")

    pairs = with_next(broken())
    assert next(pairs) == ([1], None)
    with pytest.raises(ValueError, match="broken"):
        next(pairs)
