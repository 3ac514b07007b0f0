"""``push``, ``pull``, ``sync``, ``shared`` and ``warm``, on a directory that machines share."""

from __future__ import annotations

import pytest
from archive_tools import ROOT, check_content, lookup, put
from cli_tools import run, run_json, write_checkpoint
from far_servers import free_port, needs_redis, redis_server

from promptdb import PromptDB
from promptdb.keys import Root, pack_tokens

TENANT = Root(ROOT.weights_id, ROOT.tokenizer_id, "tenant")
PROMPTS = [list(range(100, 150)), [*range(100, 130), 7, 8, 9], [5, 6]]


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    for name in (
        "PROMPTDB_SHARED",
        "PROMPTDB_PATH",
        "PROMPTDB_SHARED_SIGN",
        "PROMPTDB_SHARED_TRUST",
        "PROMPTDB_SHARED_KEY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/far"


@pytest.fixture
def filled(tmp_path):
    """Return a store with prompts in two namespaces, put before anything was shared."""
    path = tmp_path / "one"
    with PromptDB(path, chunk_tokens=16) as db:
        for prompt in PROMPTS:
            put(db, prompt, logits=[len(prompt)])
        put(db, PROMPTS[0], root=TENANT)
        db.tag("chosen", ROOT, pack_tokens(PROMPTS[1]))
    return path


def stored(path, prompt, root=ROOT):
    with PromptDB(path, readonly=True) as db:
        return check_content(db, prompt, root)


def test_push_and_pull(filled, url, tmp_path):
    two = tmp_path / "two"
    sent = run_json("push", "--db", filled, "--shared", url)
    assert sent["num_sent"] == 11
    assert run_json("push", "--db", filled, "--shared", url) == {
        "num_sent": 0, "bytes_sent": 0, "num_present": 11, "num_too_large": 0,
    }  # fmt: skip
    came = run_json("pull", "--db", two, "--shared", url)
    assert (came["tokens_stored"], came["num_listed"], came["num_rejected"]) == (50 + 3 + 2 + 50, 11, 0)
    assert [stored(two, prompt) for prompt in PROMPTS] == [50, 33, 2]
    assert stored(two, PROMPTS[0], TENANT) == 50
    again = run_json("pull", "--db", two, "--shared", url)
    assert (again["tokens_stored"], again["num_present"]) == (0, 11)
    with PromptDB(two) as db:
        assert all(lookup(db, prompt).is_complete for prompt in PROMPTS)
        assert db.verify() == []


def test_parts_are_pushed(filled, url, tmp_path):
    with PromptDB(filled, readonly=True) as db:
        node = lookup(db, PROMPTS[0]).steps[2].node.hex()
    assert run_json("push", "--db", filled, "--shared", url, "--namespace", "tenant")["num_sent"] == 4
    assert run_json("push", "--db", filled, "--shared", url + "2", "--tag", "chosen")["num_sent"] == 4
    assert run_json("push", node[:12], "--db", filled, "--shared", url + "3")["num_sent"] == 4
    assert run("push", node[:12], "--tag", "x", "--db", filled, "--shared", url, code=2)
    assert run("push", "--model", "no such", "--db", filled, "--shared", url, code=1)
    run_json("pull", "--db", tmp_path / "two", "--shared", url + "2")
    assert stored(tmp_path / "two", PROMPTS[1]) == 33


def test_parts_are_pulled(filled, url, tmp_path):
    run("push", "--db", filled, "--shared", url)
    two = tmp_path / "two"
    assert run_json("pull", "--db", two, "--shared", url, "--namespace", "tenant")["tokens_stored"] == 50
    assert run_json("pull", "--db", two, "--shared", url, "--model", "aaaa", "--namespace", "")["tokens_stored"] == 55
    assert run_json("pull", "--db", tmp_path / "three", "--shared", url, "--model", "dddd")["num_listed"] == 0
    assert "knows no model" in run("pull", "--db", two, "--shared", url, "--model", "nobody", code=1).output


def test_what_has_a_tag_is_pulled(filled, url, tmp_path):
    """A tag goes along with a push, and what has it can be pulled by others, who then have it too."""
    two = tmp_path / "two"
    run("push", "--db", filled, "--shared", url)
    assert run_json("pull", "--db", two, "--shared", url, "--tag", "chosen")["tokens_stored"] == 0  # nobody sent it
    run("push", "--db", filled, "--shared", url, "--tag", "chosen")
    came = run_json("pull", "--db", two, "--shared", url, "--tag", "chosen")
    assert (came["tokens_stored"], came["num_listed"]) == (35, 4)  # whole spans
    assert [stored(two, prompt) for prompt in PROMPTS] == [32, 33, 0]
    with PromptDB(two, readonly=True) as db:
        assert [label.num_tokens for label in db.tags("chosen")] == [33]
    assert run_json("pull", "--db", two, "--shared", url, "--tag", "chosen")["num_listed"] == 0
    assert run_json("pull", "--db", two, "--shared", url, "--tag", "other")["tokens_stored"] == 0
    assert run_json("pull", "--db", two, "--shared", url, "--tag", "chosen", "--namespace", "tenant")["num_listed"] == 0
    with PromptDB(two, shared="none") as db:
        put(db, [4, 5, 6])
        db.tag("chosen", ROOT, pack_tokens([4, 5, 6]))
    found = run_json("sync", "--db", two, "--shared", url, "--tag", "chosen")
    assert (found["sent"]["num_sent"], found["fetched"]["tokens_stored"]) == (1, 0)
    assert run_json("sync", "--db", filled, "--shared", url, "--tag", "chosen")["fetched"]["tokens_stored"] == 3
    assert stored(filled, [4, 5, 6]) == 3


def test_what_continues_a_span_is_pulled(filled, url, tmp_path):
    two = tmp_path / "two"
    with PromptDB(filled, shared="none") as db:
        put(db, [*PROMPTS[0], 1, 2], logits=[52])
        put(db, [*PROMPTS[0][:20], 3, 4, 5], logits=[21, 23])
        put(db, [*PROMPTS[0][:10], 3, 4, 5])
    run("push", "--db", filled, "--shared", url)
    with PromptDB(two, chunk_tokens=16, shared="none") as db:
        put(db, PROMPTS[0][:24])
        node = lookup(db, PROMPTS[0]).steps[1].node.hex()
    came = run_json("pull", node[:12], "--db", two, "--shared", url)
    assert stored(two, [*PROMPTS[0], 1, 2]) == 52
    assert stored(two, PROMPTS[1]) == 33
    assert stored(two, [*PROMPTS[0][:20], 3, 4, 5]) == 23
    assert stored(two, [*PROMPTS[0][:10], 3, 4, 5]) == 10
    assert (stored(two, PROMPTS[2]), stored(two, PROMPTS[0], TENANT)) == (0, 0)
    assert came["num_rejected"] == came["num_lost"] == 0
    assert run_json("pull", node[:12], "--db", two, "--shared", url)["tokens_stored"] == 0
    assert run_json("sync", node[:12], "--db", two, "--shared", url)["sent"]["num_sent"] <= 1  # logits of its own
    assert run_json("sync", node[:12], "--db", two, "--shared", url)["sent"]["num_sent"] == 0
    assert run("pull", node[:12], "--tag", "x", "--db", two, "--shared", url, code=2)
    assert run("pull", "0123456789", "--db", two, "--shared", url, code=1)
    assert run("pull", "--tag", "", "--db", two, "--shared", url, code=2)


def test_sync(filled, url, tmp_path):
    two = tmp_path / "two"
    with PromptDB(two, chunk_tokens=16) as db:
        put(db, [9, *PROMPTS[0]])
    run("push", "--db", filled, "--shared", url)
    found = run_json("sync", "--db", two, "--shared", url)
    assert (found["sent"]["num_sent"], found["fetched"]["tokens_stored"]) == (4, 105)
    assert "sent 0 spans" in run("sync", "--db", filled, "--shared", url).stdout
    assert stored(filled, [9, *PROMPTS[0]]) == 51


def test_damage_is_told(filled, url, tmp_path):
    run("push", "--db", filled, "--shared", url)
    values = sorted((tmp_path / "far" / "v").rglob("*"), key=lambda path: path.is_file())
    values[-1].unlink()
    values[-2].write_bytes(values[-2].read_bytes()[:-1] + b"x")
    found = run_json("pull", "--db", tmp_path / "two", "--shared", url, code=1)
    assert found["num_lost"] + found["num_rejected"] >= 2
    with PromptDB(tmp_path / "two") as db:
        assert db.verify() == []


def test_the_setting(filled, url, tmp_path):
    assert "no shared store is named" in run("push", "--db", filled, code=2).output
    assert "not shared" in run("shared", "set", "none", "--db", filled).stdout
    assert url in run("shared", "set", url, "--db", filled).stdout
    assert run_json("push", "--db", filled)["num_sent"] == 11
    assert "password" in run("shared", "set", "redis://a:b@host", "--db", filled, code=2).output
    assert run_json("shared", "set", "none", "--db", filled) == {"url": ""}


def test_status(filled, url, tmp_path):
    found = run_json("shared", "status", "--db", filled, "--shared", url)
    assert found["reachable"]
    assert found["fetch_bytes_per_s"] > 0
    assert list((tmp_path / "far").rglob("x/*/*")) == []
    assert "answers" in run("shared", "status", "--db", filled, "--shared", url).stdout
    pytest.importorskip("redis")
    gone = f"redis://127.0.0.1:{free_port()}?timeout_s=0.3&connect_timeout_s=0.3"
    assert "cannot be reached" in run("shared", "status", "--db", filled, "--shared", gone, code=1).stdout
    assert "cannot be reached" in run("push", "--db", filled, "--shared", gone, code=2).output


@needs_redis()
def test_status_of_a_server(filled, tmp_path):
    with redis_server(tmp_path / "redis", maxmemory="64mb", maxmemory_policy="allkeys-lru") as server:
        text = run("shared", "status", "--db", filled, "--shared", server.url).stdout
        assert "allkeys-lru" in text
        assert "67.1 MB" in text
        assert server.cli("dbsize").strip() == "0"


def test_keygen(tmp_path, filled, url, monkeypatch):
    key, trusted = tmp_path / "key.pem", tmp_path / "trusted"
    public = run_json("shared", "keygen", key)["public_key"]
    assert key.stat().st_mode & 0o777 == 0o600
    assert "cannot be written" in run("shared", "keygen", key, code=2).output
    trusted.write_text(public)
    monkeypatch.setenv("PROMPTDB_SHARED_TRUST", str(trusted))
    run("push", "--db", filled, "--shared", url, "--namespace", "tenant")  # unsigned
    monkeypatch.setenv("PROMPTDB_SHARED_SIGN", str(key))
    run("push", "--db", filled, "--shared", url, "--namespace", "")
    found = run_json("pull", "--db", tmp_path / "two", "--shared", url, code=1)
    assert found["num_rejected"] == 4
    assert stored(tmp_path / "two", PROMPTS[0]) == 50
    assert stored(tmp_path / "two", PROMPTS[0], TENANT) == 0


def test_warm(tmp_path, url):
    """One machine computes for the other, which has nothing left to do."""
    model = write_checkpoint(tmp_path / "model")
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"text": "Hello there. General Kenobi"}\n{"pieces": ["Hello there.", " Major"]}\n')
    options = ("--model", model, "--file", lines, "--shared", url)
    first = run_json("warm", "--db", tmp_path / "one", *options)
    assert first["num_prompts"] == 2
    assert first["tokens_computed"] > 0
    assert (first["waiting"], first["spans_sent"] > 0) == (0, True)
    second = run_json("warm", "--db", tmp_path / "two", *options)
    assert second["tokens_computed"] == 0
    assert second["tokens_fetched"] == first["tokens_computed"]
    assert "0 tokens computed" in run("warm", "--db", tmp_path / "two", *options).stdout
    assert "no shared store" in run("warm", "--db", tmp_path / "two", *options[:-2], code=2).output
    texts = ("Hello there. General Kenobi",)
    found = run_json("get", "--model", model, "--db", tmp_path / "two", *texts)
    assert (found["tokens_fetched"], found["is_complete"]) == (0, True)
    run("put", "--model", model, "--db", tmp_path / "six", "Something else.")  # so that it knows the model
    assert run_json("get", "--model", model, "--db", tmp_path / "six", *texts, code=1)["num_stored"] == 0
    found = run_json("get", "--model", model, "--db", tmp_path / "six", "--shared", url, *texts)
    assert found["tokens_fetched"] == found["num_tokens"] == found["num_stored"]
    assert (found["tokens_computed"], found["is_complete"]) == (0, True)
    found = run_json("get", "--model", model, "--db", tmp_path / "five", "--shared", url, "--compute", *texts)
    assert (found["tokens_fetched"], found["tokens_computed"]) == (found["num_tokens"], 0)
    pair = ("Hello there.", " General Kenobi")
    assert run_json("score", "--model", model, "--db", tmp_path / "seven", *pair)["tokens_computed"] > 0
    assert (
        run_json("score", "--model", model, "--db", tmp_path / "eight", "--shared", url, *pair)["tokens_computed"] == 0
    )
    put_options = ("--model", model, "--shared", url, "--db", tmp_path / "three")
    assert run_json("put", *put_options, "Hello there. General Kenobi")["tokens_computed"] == 0
    assert run_json("put", *put_options[:2], "--db", tmp_path / "four", "Hello there.")["tokens_computed"] > 0
