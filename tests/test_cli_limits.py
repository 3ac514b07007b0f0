"""The commands that say what goes and what stays, and the options of `put` for it."""

import json
import math
import time

import click
import pytest
from cli_tools import run, run_json, write_checkpoint
from promptdb.cli.lifetime import apply_lifetime
from promptdb.cli.quantities import duration_option, size_option

from promptdb import PromptDB
from promptdb.keys import num_tokens

TEXTS = [f"Prompt number {n} is the one that starts like all others." for n in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def store(monkeypatch, tmp_path):
    path = tmp_path / "store.promptdb"
    monkeypatch.setenv("PROMPTDB_PATH", str(path))
    yield path
    with PromptDB(path) as db:
        assert db.verify() == []


@pytest.fixture
def filled(store, model):
    for text in TEXTS:
        run("put", "--model", model, text)
    return store


def test_limits_are_shown_and_set(filled):
    assert run_json("limits")["quota_bytes"] == 0
    assert "quota    none" in run("limits").stdout
    charged = run_json("limits")["charged_bytes"]
    found = run_json("limits", "--quota", "1GB", "--policy", "lru", "--ttl", "2h", "--namespace", "é")
    assert (found["quota_bytes"], found["policy"], found["ttl_s"]) == (10**9, "lru", {"é": 7200.0})
    assert "1 GB, lru first" in run("limits").stdout
    assert "2 h in é" in run("limits").stdout
    assert run_json("limits", "--quota", str(charged - 1))["num_evicted"] > 0
    assert run_json("stat")["charged_bytes"] < charged
    assert run_json("limits", "--quota", "none", "--ttl", "none", "--namespace", "é")["ttl_s"] == {}
    assert "evicted" in run("stat").stdout


@pytest.mark.parametrize("arguments", [("--quota", "many"), ("--ttl", "0s"), ("--ttl", "7"), ("--policy", "random")])
def test_limits_that_cannot_be(filled, arguments):
    result = run("limits", *arguments, code=2)
    assert "is no" in result.stderr or "is not one of" in result.stderr
    assert run_json("limits")["quota_bytes"] == 0


def test_a_quota_below_what_is_pinned_is_refused(filled):
    run("pin", run_json("ls", "--limit", "1")["nodes"][0]["node"])
    error = run("limits", "--quota", "10kB", code=2).stderr
    assert "are pinned" in error
    assert "promptdb unpin" in error


def test_gc(filled):
    assert "Removed nothing." in run("gc").stdout
    before = run_json("stat")
    dry = run_json("gc", "--dry-run", "--to", "10kB")
    assert dry["is_dry_run"]
    assert run_json("stat")["num_nodes"] == before["num_nodes"]
    assert "Would remove" in run("gc", "--dry-run", "--to", "10kB").stdout
    done = run_json("gc", "--to", "10kB")
    assert done["num_evicted"] == dry["num_evicted"] == before["num_nodes"] - run_json("stat")["num_nodes"] > 0
    assert done["charged_bytes"] <= 10_000
    run("gc", "--to", "none")
    assert run_json("stat")["num_nodes"] == 0


def test_compact(filled):
    run("gc", "--to", "0")
    found = run_json("compact")
    assert found["after_bytes"] < found["before_bytes"]
    assert "before" in run("compact").stdout


def test_pins(filled, model):
    nodes = run_json("ls", "--sort", "start")["nodes"]
    (pin,) = run_json("pin", nodes[0]["node"][:10], "--name", "é b", "--expires", "90d")["pins"]
    assert (pin["node"], pin["name"], pin["kind"]) == (nodes[0]["node"], "é b", "pin")
    assert pin["expires_unix_s"] - pin["created_unix_s"] == 90 * 86400
    (other,) = run_json("pin", "--model", model, TEXTS[1])["pins"]
    assert other["expires_unix_s"] - other["created_unix_s"] == 30 * 86400
    assert len(run_json("pins")["pins"]) == 2
    assert "90 days" in run("pins").stdout
    run("gc", "--to", "0")
    assert run_json("get", "--model", model, TEXTS[1])["is_complete"]
    assert not run_json("get", "--model", model, TEXTS[2], code=1)["is_complete"]
    assert run_json("unpin", "--name", "é b")["pins_removed"] == 1
    assert run_json("unpin", other["node"])["pins_removed"] == 1
    assert run_json("unpin", other["node"], code=1)["pins_removed"] == 0
    assert "no pins" in run("pins").stdout


def test_pins_that_cannot_be(filled, model):
    for arguments in ((), ("--tag", "nobody's"), ("zzzz",), ("00000000",), ("--model", model, "Nothing like it")):
        assert run("pin", *arguments, code=None).exit_code in (1, 2)
    assert run("unpin", code=2).stderr
    assert run_json("pins") == {"pins": [], "tags": []}


def test_tags_and_times_to_live(filled, model):
    """What `put` does with its options, once a prompt is stored."""
    with PromptDB(filled) as db:
        (root,) = [root for root, _ in db.roots()]
        packed = packed_of(db, root)
        apply_lifetime(db, root, packed, tag="evaluation", ttl_s=None)
        apply_lifetime(db, root, packed, tag=None, ttl_s=60.0)  # never shorter than it was
        assert db.gc().num_expired == 0
        assert db.tags()[0].num_tokens == num_tokens(packed)
    listed = run_json("ls", "--tag", "evaluation")["nodes"]
    assert sum(each["num_tokens"] for each in listed) == num_tokens(packed)
    assert run_json("ls", "--tag", "other")["nodes"] == []
    assert run_json("pins")["tags"][0]["name"] == "evaluation"
    assert "as the span" in run("pins").stdout
    assert len(run_json("pin", "--tag", "evaluation")["pins"]) == 1


def packed_of(db, root):
    with db.read() as snapshot:
        return max((db.prefix(snapshot, record) for _, record in db.nodes()), key=len)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("7", 7),
        ("20GB", 20 * 10**9),
        ("1.5 kB", 1500),
        ("20GiB", 20 * 2**30),
        ("5mib", 5 * 2**20),
        ("NONE", 0),
    ],
)
def test_sizes(text, number):
    assert size_option(None, None, text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("90s", 90), ("30min", 1800), ("12h", 43200), ("7d", 604800), ("2w", 1209600), ("0.5h", 1800), ("none", math.inf)],
)
def test_durations(text, number):
    assert duration_option(None, None, text) == number


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1e3", "5 apples", "٣", "inf", "nan", "1 kb kb", "9" * 30, "0x10", "\n"]
)
def test_what_is_no_quantity(text):
    with pytest.raises(click.BadParameter):
        size_option(None, None, text)
    with pytest.raises(click.BadParameter):
        duration_option(None, None, text)


def test_put_takes_a_tag_and_a_time_to_live(store, model):
    run("put", "--model", model, "--tag", "é v", "--ttl", "2h", TEXTS[0])
    (tag,) = run_json("pins")["tags"]
    assert tag["name"] == "é v"
    with PromptDB(store) as db:
        assert db.usage()["charged_bytes"] > 0
    with PromptDB(store, clock=lambda: time.time() + 1.9 * 3600) as db:
        assert db.gc().num_expired == 0
    # Again, with all of it stored: it lives longer, and nothing is written.
    assert run_json("put", "--model", model, "--ttl", "9h", TEXTS[0])["spans_written"] == 0
    with PromptDB(store, clock=lambda: time.time() + 8.9 * 3600) as db:
        assert db.gc().num_expired == 0
    with PromptDB(store, clock=lambda: time.time() + 9.1 * 3600) as db:
        assert db.gc().num_expired > 0
        assert db.stat()["num_nodes"] == 0


def test_put_refuses_a_bad_tag_before_it_loads_anything(store):
    assert "the name" in run("put", "--model", "nowhere", "--tag", "a\nb", "x", code=2).stderr
    assert "is no" in run("put", "--model", "nowhere", "--ttl", "soon", "x", code=2).stderr


def test_a_job_that_is_larger_than_its_quota_goes_on(store, model):
    run("put", "--model", model, TEXTS[0])
    quota = 3 * run_json("stat")["charged_bytes"]
    run("limits", "--quota", str(quota))
    lines = "".join(json.dumps({"text": f"{n} {TEXTS[0]}"}) + "\n" for n in range(20))
    assert "20 prompts" in run("put", "--model", model, "--tag", "t", "--file", "-", stdin=lines).stdout
    found = run_json("stat")
    assert found["num_evicted"] > 10
    assert 0 < found["charged_bytes"] <= quota
