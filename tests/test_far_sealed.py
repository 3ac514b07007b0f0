"""A shared store with a team's key: the same contract, and nothing that its operator could read, change or move."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import redis
from archive_tools import ROOT, lookup, put
from cli_tools import run, run_json
from far_servers import needs_redis, redis_server
from shared_tools import PROMPT, Machine
from test_far_stores import Shared

from promptdb import PromptDB
from promptdb.errors import InputTypeError, SharedError, StoreKeyError
from promptdb.far_open import open_far
from promptdb.far_sealed import FarSealed
from promptdb.keys import pack_tokens
from promptdb.pulling import Want
from promptdb.shared_options import SharedOptions
from promptdb.signing import write_key

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
NAMES = ("PROMPTDB_SHARED", "PROMPTDB_SHARED_SIGN", "PROMPTDB_SHARED_TRUST", "PROMPTDB_SHARED_KEY_FILE")


@pytest.fixture(autouse=True)
def key_in_the_environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PROMPTDB_SHARED_KEY", KEY.hex())


class Sealed(Shared):
    def open_far(self, name):
        return open_far(SharedOptions(self.url(name), timeout_s=10, key=KEY))


class TestDirectory(Sealed):
    @pytest.fixture(autouse=True)
    def directory(self, tmp_path):
        self.path = tmp_path

    def url(self, name):
        return f"file://{self.path}/{name}"


@needs_redis()
class TestRedisBeforeADirectory(Sealed):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls, tmp_path_factory):
        with redis_server(tmp_path_factory.mktemp("redis"), maxmemory="256mb") as server:
            cls.server, cls.path = server, tmp_path_factory.mktemp("behind")
            yield server

    def url(self, name):
        return f"{self.server.url}?prefix={name} file://{self.path}/{name}"


def everything(directory: Path) -> bytes:
    """Return all names and contents under a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return b"\n".join(str(path.relative_to(directory)).encode() + b"\n" + path.read_bytes() for path in files)


def secrets_of(machine: Machine) -> list[bytes]:
    """Return what must not be seen: tokens, digests that follow from them, names of models."""
    match = lookup(machine.db, PROMPT)
    digests = [ROOT.digest, *(step.node for step in match.steps)]
    texts = [ROOT.weights_id.encode(), ROOT.tokenizer_id.encode(), b"tenant", b"weights_id", b"tokens"]
    hidden = [*digests, *(each.hex().encode() for each in digests), ROOT.digest[:16].hex().encode(), *texts]
    return [*hidden, *(pack_tokens(PROMPT[at : at + 3]) for at in range(0, 48, 4))]


@pytest.mark.parametrize("is_sealed", [True, False])
def test_what_the_operator_sees(machine, tmp_path, is_sealed, monkeypatch):
    if not is_sealed:  # so that the search is known to find
        monkeypatch.delenv("PROMPTDB_SHARED_KEY")
    one, two = machine("one"), machine("two")
    one.put(PROMPT, logits=[20, 50])
    one.put(PROMPT[:40], logits=[40])
    assert two.pull(PROMPT) == 50
    assert lookup(two.db, PROMPT).is_complete
    seen = everything(tmp_path / "far")
    found = [each for each in secrets_of(one) if each in seen]
    assert (found == []) == is_sealed
    assert len(found) > 10 or is_sealed


def test_the_same_value_twice_looks_different(machine, tmp_path):
    one = machine("one")
    one.put(PROMPT)
    far = open_far(SharedOptions(f"file://{tmp_path}/same", key=KEY))
    far.put([("v/one", b"content"), ("v/two", b"content")])
    contents = {path.read_bytes() for path in (tmp_path / "same" / "v").rglob("*") if path.is_file()}
    assert len(contents) == 2


def test_another_key_and_none(machine, tmp_path, caplog):
    """Nothing is found, nothing is added, and it is said."""
    url = f"file://{tmp_path}/far"
    one = machine("one", url=url, key=KEY)
    one.put(PROMPT)
    before = everything(tmp_path / "far")
    for name, key, reason in (("other", OTHER_KEY, "another key"), ("none", b"", "there is no key")):
        stranger = machine(name, url=url, key=key)
        with caplog.at_level(logging.WARNING, "promptdb"):
            assert stranger.pull(PROMPT) == 0
            put(stranger.db, [1, *PROMPT])
            assert not stranger.tier.flush(1.0)
            assert stranger.pull(PROMPT) == 0
        assert reason in stranger.tier.status()["last_failure"]
        assert sum("writing" in record.message and reason in record.message for record in caplog.records) <= 1
        assert any(reason in record.message for record in caplog.records)
        assert everything(tmp_path / "far") == before
        caplog.clear()
    required = machine("required", url=url, key=OTHER_KEY, required=True)
    with pytest.raises(SharedError, match="another key"):
        required.tier.pull(ROOT, [Want(pack_tokens(PROMPT))])
    assert machine("two", url=url, key=KEY).pull(PROMPT) == 50


def test_a_new_key_under_a_new_prefix(machine, tmp_path):
    """How a key is changed."""
    one = machine("one", url=f"file://{tmp_path}/far", key=KEY)
    one.put(PROMPT)
    two = machine("two", url=f"file://{tmp_path}/far2", key=OTHER_KEY)
    two.put(PROMPT)
    assert machine("three", url=f"file://{tmp_path}/far2", key=OTHER_KEY).pull(PROMPT) == 50


def test_what_is_not_encrypted_stays_apart(machine, tmp_path):
    url = f"file://{tmp_path}/far"
    plain = machine("plain", url=url, key=b"")
    plain.put(PROMPT)
    before = everything(tmp_path / "far")
    one = machine("one", url=url, key=KEY)
    assert one.pull(PROMPT) == 0
    put(one.db, PROMPT)
    assert not one.tier.flush(1.0)
    assert "not encrypted" in one.tier.status()["last_failure"]
    assert everything(tmp_path / "far") == before


@needs_redis()
class TestRedis:
    @pytest.fixture
    def server(self, tmp_path):
        with redis_server(tmp_path / "redis") as server:
            yield server

    @pytest.fixture
    def client(self, server):
        with redis.Redis(port=server.port) as client:
            yield client

    def test_names_in_the_server(self, machine, server, client):
        one, two = machine("one", url=server.url), machine("two", url=server.url)
        one.tier.leases.settle(ROOT, lambda: [Want(pack_tokens(PROMPT))])
        one.put(PROMPT, logits=[50])
        assert two.pull(PROMPT) == 50
        names = client.keys("*")
        assert {name.split(b"/")[0] for name in names} == {
            b"promptdb:" + kind for kind in (b"i", b"v", b"r", b"c", b"k")
        }
        seen = b"\n".join(names) + b"\n".join(client.get(name) for name in names)
        assert [each for each in secrets_of(one) if each in seen] == []

    @pytest.mark.parametrize("kind", ["i", "v"])
    def test_values_that_are_moved_or_changed(self, machine, server, client, kind):
        """An operator who swaps, cuts or changes what lies there causes misses, and nothing else."""
        one, two = machine("one", url=server.url), machine("two", url=server.url)
        one.put(PROMPT)
        first, second, *others = sorted(client.keys(f"promptdb:{kind}/*"))
        contents = [client.get(name) for name in (first, second)]
        client.set(first, contents[1])
        client.set(second, contents[0])
        client.set(others[0], client.get(others[0])[:-1] + b"x")
        assert two.pull(PROMPT) < 50
        assert two.counts.rejected + two.counts.lost > 0
        for number in range(4):  # who meets it takes it out, computes, and puts it again
            other = machine(f"other{number}", url=server.url)
            other.pull(PROMPT)
            other.put(PROMPT)
        assert machine("last", url=server.url).pull(PROMPT) == 50

    def test_two_who_begin_at_once(self, server):
        """Both mark an empty store: the first wins, and who has another key is refused."""
        fars = [open_far(SharedOptions(server.url, key=key)) for key in (KEY, OTHER_KEY, KEY)]
        assert all(far.get(["v/one"]) == [None] for far in fars)
        fars[0].put([("v/one", b"first")])
        with pytest.raises(SharedError, match="another key"):
            fars[1].put([("v/two", b"second")])
        fars[2].put([("v/three", b"third")])
        assert fars[0].get(["v/three"]) == [[b"third"]]


def test_signed_and_encrypted(machine, tmp_path):
    write_key(str(tmp_path / "key.pem"))
    public = write_key(str(tmp_path / "other.pem"))
    (tmp_path / "trusted").write_text(public)
    machine("one", sign_with=str(tmp_path / "key.pem"), key=KEY).put(PROMPT)
    machine("two", sign_with=str(tmp_path / "other.pem"), key=KEY).put([1, *PROMPT])
    reader = machine("three", trust=str(tmp_path / "trusted"), key=KEY)
    assert reader.pull(PROMPT) == 0
    assert reader.pull([1, *PROMPT]) == 51


def test_where_the_key_comes_from(tmp_path, monkeypatch):
    url = f"file://{tmp_path}/far"
    assert SharedOptions.of_url(url).key == KEY
    assert "kkkk" not in repr(SharedOptions.of_url(url))
    assert KEY.hex() not in repr(SharedOptions.of_url(url))
    (tmp_path / "key").write_text(OTHER_KEY.hex() + "\n")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setenv("PROMPTDB_SHARED_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(StoreKeyError, match="PROMPTDB_SHARED_KEY and PROMPTDB_SHARED_KEY_FILE"):
        SharedOptions.of_url(url)
    monkeypatch.delenv("PROMPTDB_SHARED_KEY")
    assert SharedOptions.of_url(url).key == OTHER_KEY
    assert isinstance(open_far(SharedOptions.of_url(url)), FarSealed)
    monkeypatch.setenv("PROMPTDB_SHARED_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreKeyError, match="cannot be read"):
        PromptDB(tmp_path / "db", shared=url)
    with pytest.raises(InputTypeError):
        SharedOptions(url, key=b"short")


def test_the_commands(tmp_path, monkeypatch):
    url = f"file://{tmp_path}/far"
    with PromptDB(tmp_path / "one", chunk_tokens=16, shared="none") as db:
        put(db, PROMPT)
    assert run_json("push", "--db", tmp_path / "one", "--shared", url)["num_sent"] == 4
    assert run_json("push", "--db", tmp_path / "one", "--shared", url)["num_present"] == 4
    assert run_json("pull", "--db", tmp_path / "two", "--shared", url)["tokens_stored"] == 50
    assert "with the team's key" in run("shared", "status", "--db", tmp_path / "one", "--shared", url).stdout
    assert "encrypted with the team's key" in run("doctor", "--db", tmp_path / "one", "--shared", url, code=None).stdout
    for key, reason in ((OTHER_KEY.hex(), "another key"), ("", "there is no key")):
        monkeypatch.setenv("PROMPTDB_SHARED_KEY", key)
        assert reason in run("shared", "status", "--db", tmp_path / "one", "--shared", url, code=1).stdout
        for command in ("push", "pull", "sync"):
            assert reason in run(command, "--db", tmp_path / "one", "--shared", url, code=2).output
        assert reason in run("doctor", "--db", tmp_path / "one", "--shared", url, code=2).stdout
