"""Workers with stores of their own share a corpus: what all have in common is computed once, and nothing twice."""

from __future__ import annotations

import random

import pytest
import torch
from cli_tools import write_checkpoint

from promptdb import Engine, PromptDB
from promptdb.errors import IdentityError, SharedError
from promptdb.keys import unpack_tokens
from promptdb.shared import connect
from promptdb.shared_sync import pull
from promptdb.shares import split
from promptdb.tokens import Prompt
from promptdb.worker import Worker

BEGINNING = "The cache keeps what the model has read, so that the next prompt which begins alike is short. " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "llama")


def distinct(prompts):
    tokens = [tuple(unpack_tokens(prompt.packed)) for prompt in prompts]
    return len({each[: end + 1] for each in tokens for end in range(len(each))})


def corpora():
    """Few-shot prompts; a tree of pieces in which prompts end anywhere; nothing in common."""
    chance = random.Random(5)
    tree = [[BEGINNING[:100]]]
    for _ in range(14):
        parent = chance.choice(tree)
        tree.append([*parent, chance.choice([" yes", " no, ", BEGINNING[chance.randrange(200) :][:60]])])
    yield [[BEGINNING, f"Question {number}?", f" {number}"] for number in range(8)] + [[BEGINNING]]
    yield [*tree, tree[3]]
    yield [["One."], ["Two."], ["你好 🙂"]]


@pytest.mark.parametrize("number", range(3))
def test_no_token_is_computed_twice(number, model, tmp_path):
    url, texts = f"file://{tmp_path}/far", list(corpora())[number]
    workers = [Worker(model, url, path=tmp_path / name) for name in ("one", "two", "three")]
    assert len({worker.root() for worker in workers}) == 1
    with PromptDB(tmp_path / "four", shared=url) as db, Engine.from_pretrained(db, model) as engine:
        prompts = [engine.tokenize(text) for text in texts]
        shares = split(prompts, len(workers))
        assert bool(shares.first) == (number < 2)
        done = [workers[0].compute(shares.first)]
        assert done[0].tokens_computed == shares.first_tokens
        for at, (share, bases) in enumerate(zip(shares.shares, shares.bases, strict=True)):
            found = workers[at % 3].compute([prompts[each] for each in share], [shares.first[each] for each in bases])
            assert found.tokens_computed == shares.share_tokens[at]
            assert found.num_prompts == len(share)
            done.append(found)
        assert sum(each.tokens_computed for each in done) == distinct(prompts)
        assert any(each.bytes_sent for each in done)
        for worker in workers:
            worker.close()
            worker.close()
        pull(db, connect(db))
        for text, found in zip(texts, engine.run(texts), strict=True):
            assert found.tokens_computed == 0
            ids = torch.tensor([engine.tokenizer("".join(text))["input_ids"]])
            with torch.no_grad():
                expected = engine.model(ids).logits[0, -1]
            torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
    for name in ("one", "two", "three"):
        with PromptDB(tmp_path / name, shared="none") as local:
            assert local.verify() == []


def test_again(model, tmp_path):
    """Another worker has only to fetch, and one that was here before not even that."""
    url, prompt = f"file://{tmp_path}/far", [BEGINNING, "and more"]
    with Worker(model, url, path=tmp_path / "one") as worker, Worker(model, url, path=tmp_path / "two") as other:
        asked = [worker._engine.tokenize(prompt)]
        computed = worker.compute(asked).tokens_computed
        found = other.compute(asked, asked)
        assert (found.tokens_computed, found.tokens_fetched, found.bytes_sent) == (0, computed, 0)
        assert worker.compute(asked).tokens_fetched == 0


def test_what_is_wrong_is_told(model, tmp_path, monkeypatch):
    monkeypatch.delenv("PROMPTDB_SHARED", raising=False)
    url = f"file://{tmp_path}/far"
    with pytest.raises(SharedError, match="reading only"):
        Worker(model, url + "?readonly=1", path=tmp_path / "one")
    with pytest.raises(SharedError, match="required"):
        Worker(model, "none", path=tmp_path / "one")
    with pytest.raises(IdentityError, match="tokenizer"):
        Worker(model, url, path=tmp_path / "one", tokenizer_id="00" * 32)
    (tmp_path / "far").write_text("a file where a directory should be")
    with Worker(model, url, path=tmp_path / "one") as worker, pytest.raises(SharedError):
        worker.compute([Prompt(worker._engine.tokenize("one").packed)])
