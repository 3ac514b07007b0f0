"""Engines on machines that share: what one computed another loads, and it is what computing gives."""

from __future__ import annotations

import time

import pytest
import torch
from children import Child
from conftest import TEXT, shared_model, shared_tokenizer
from far_servers import free_port, needs_redis, redis_cluster, redis_server

from promptdb import Engine, PromptDB
from promptdb.shared_options import SharedOptions

PROMPTS = [TEXT, TEXT[:60], TEXT[:60] + " and then?", "Something else entirely.", TEXT + TEXT[:40]]
WAIT_S = 30.0


def expected(model, prompt):
    """Return the last logits and log-probabilities that a plain forward pass gives."""
    ids = torch.tensor([shared_tokenizer()(prompt)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    scores = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    return logits[-1], scores


def check(found, prompt, model):
    logits, scores = expected(model, prompt)
    torch.testing.assert_close(found.logits.double(), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.token_logprobs.double(), scores, atol=1e-5, rtol=1e-5)


@pytest.fixture
def engines(tmp_path):
    """Return what makes engines, each on a store of its own."""
    made = []

    def make(name, url, arch="llama", **options):
        db = PromptDB(tmp_path / name, chunk_tokens=16, shared=url)
        engine = Engine(db, shared_model(arch), shared_tokenizer(), **options)
        made.append((db, engine))
        return engine

    yield make
    for db, engine in made:
        engine.close()
        db.close()


def flush(engine):
    engine.flush()
    assert engine.db.tier.flush(WAIT_S)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "deepseek_v3"])
def test_what_one_computed_another_loads(engines, tmp_path, arch):
    url = f"file://{tmp_path}/far"
    one, two = engines("one", url, arch), engines("two", url, arch)
    for prompt in PROMPTS:
        one.get(prompt)
    flush(one)
    for prompt in reversed(PROMPTS):
        found = two.get(prompt)
        check(found, prompt, two.model)
        assert found.tokens_computed == 0
    cache = two.get(TEXT).past_key_values()
    own = one.get(TEXT).past_key_values()
    for mine, theirs in zip(own.layers, cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    longer = two.get(TEXT + " More of it.")
    check(longer, TEXT + " More of it.", two.model)
    assert longer.tokens_loaded >= len(shared_tokenizer()(TEXT)["input_ids"]) - 1


def test_pieces_and_batches(engines, tmp_path):
    url = f"file://{tmp_path}/far"
    one, two, three = (engines(name, url) for name in ("one", "two", "three"))
    pieces = [[TEXT[:33], TEXT[33:70], tail] for tail in ("yes", "no", "perhaps not")]
    for found, prompt in zip(one.run(pieces), pieces, strict=True):
        check(found, "".join(prompt), one.model)
    flush(one)
    results = list(two.run([*pieces, "new"]))
    assert [found.tokens_computed for found in results[:3]] == [0, 0, 0]
    for found, prompt in zip(results, [*pieces, "new"], strict=True):
        check(found, "".join(prompt), two.model)
    assert two.db.tier.calls.counts.tokens_fetched
    found = three.get(pieces[1])
    assert found.tokens_computed == 0
    check(found, "".join(pieces[1]), three.model)


def test_other_weights_find_nothing(engines, tmp_path):
    url = f"file://{tmp_path}/far"
    one, two = engines("one", url, "llama"), engines("two", url, "gpt2")
    one.get(TEXT)
    flush(one)
    assert two.get(TEXT).tokens_loaded == 0
    other = engines("three", url, "llama", namespace="tenant")
    assert other.get(TEXT).tokens_loaded == 0
    assert other.db.tier.calls.counts.hits == 0


def test_a_strict_engine_takes_what_was_computed_its_way(engines, tmp_path):
    url = f"file://{tmp_path}/far"
    one, two = engines("one", url), engines("two", url, strict=True)
    one.get(TEXT)
    flush(one)
    assert two.get(TEXT).tokens_loaded in (0, len(shared_tokenizer()(TEXT)["input_ids"]))
    check(two.get(TEXT), TEXT, two.model)


def test_without_a_far_side_everything_goes_on(engines, tmp_path):
    options = SharedOptions(f"redis://127.0.0.1:{free_port()}", timeout_s=0.3, connect_timeout_s=0.3)
    pytest.importorskip("redis")
    engine = engines("one", options)
    began = time.monotonic()
    for prompt in PROMPTS:
        check(engine.get(prompt), prompt, engine.model)
    assert next(iter(engine.run(PROMPTS))).tokens_computed == 0
    assert time.monotonic() - began < 30
    assert engine.db.tier.num_waiting()


CHILD = """
import sys
from promptdb import Engine, PromptDB
from promptdb.demo_models import random_model
from promptdb.demo_text import byte_tokenizer
path, url, *prompts = sys.argv[1:]
with PromptDB(path, chunk_tokens=16, shared=url) as db:
    with Engine(db, random_model("llama"), byte_tokenizer()) as engine:
        for prompt in prompts:
            found = engine.get(prompt)
            print(found.tokens_loaded, found.tokens_computed, found.logits.tolist())
    assert db.tier.flush(60)
"""


def run_child(path, url, prompts):
    with Child(CHILD, path, url, *prompts) as child:
        return [line.split(" ", 2) for line in child.read().splitlines()]


@needs_redis()
def test_two_processes_fill_each_other(engines, tmp_path):
    """Each computes what the other has not, and both get what a plain pass gives."""
    with redis_server(tmp_path / "far") as server:
        here = engines("one", server.url)
        for prompt in PROMPTS[:3]:
            here.get(prompt)
        flush(here)
        there = run_child(tmp_path / "two", server.url, [*PROMPTS[:3], PROMPTS[4]])
        assert [int(computed) for _, computed, _ in there[:3]] == [0, 0, 0]
        assert int(there[3][1]) > 0
        here._extender.cost.rates.clear()  # so fast a model would rather compute these few tokens
        found = here.get(PROMPTS[4])
        assert found.tokens_computed == 0
        check(found, PROMPTS[4], here.model)
    for (_, _, logits), prompt in zip(there, [*PROMPTS[:3], PROMPTS[4]], strict=True):
        numbers = torch.tensor([float(each) for each in logits.strip("[]").split(",")])
        torch.testing.assert_close(numbers.double(), expected(here.model, prompt)[0], atol=1e-5, rtol=1e-5)


@needs_redis()
def test_through_a_cluster(engines, tmp_path):
    with redis_cluster(tmp_path / "far") as nodes:
        url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
        one, two = engines("one", url), engines("two", url)
        one.get(TEXT)
        flush(one)
        found = two.get(TEXT)
        assert found.tokens_computed == 0
        check(found, TEXT, two.model)
