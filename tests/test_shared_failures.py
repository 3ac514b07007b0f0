"""Everything that goes wrong on the far side: what it costs a caller, what is said, and that it heals."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from archive_tools import ROOT, lookup, put
from far_servers import free_port, needs_redis, proxy_to, redis_cluster, redis_server, write_certificates
from shared_tools import PROMPT, WAIT_S, Machine

from promptdb.errors import SharedError
from promptdb.far import TooLargeError
from promptdb.far_open import open_far
from promptdb.keys import pack_tokens
from promptdb.pulling import Want
from promptdb.shared_options import SharedOptions

pytestmark = needs_redis()

QUICK = {"timeout_s": 0.3, "connect_timeout_s": 0.3}
# What a caller waits at most: connecting, two round trips, and half a second; and what a busy machine adds.
BOUND_S = 0.3 + 2 * 0.3 + 0.5 + 1.0


@pytest.fixture
def server(tmp_path):
    with redis_server(tmp_path / "redis") as server:
        yield server


def timed_pull(machine: Machine, tokens=PROMPT) -> tuple[int, float]:
    began = time.monotonic()
    return machine.pull(tokens), time.monotonic() - began


def forget_failure(machine: Machine) -> None:
    """Let the next call try again at once."""
    for breaker in (machine.tier.calls.reading, machine.tier.calls.writing):
        breaker._next_try = 0.0


def wait_until(condition, seconds: float = WAIT_S) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_nobody_there(machine, caplog):
    """A miss, said once, and not tried again for a while."""
    one = machine(url=f"redis://127.0.0.1:{free_port()}", **QUICK)
    with caplog.at_level(logging.WARNING, "promptdb"):
        found, waited_s = timed_pull(one)
        assert (found, waited_s < BOUND_S) == (0, True)
        for _ in range(20):
            found, waited_s = timed_pull(one)
            assert (found, waited_s < 0.05) == (0, True)
    assert one.tier.calls.reading.num_failures == 1
    assert "cannot be reached" in one.tier.status()["last_failure"]
    (told,) = [record for record in caplog.records if "reading" in record.message]
    assert told.event == "shared_failed"
    assert "cannot be reached" in told.reason
    assert told.what.startswith("reading from the shared store redis://")


def test_a_server_that_hangs(machine, server):
    """It takes connections and never answers: a caller waits for the timeouts, once."""
    with proxy_to(server.port) as proxy:
        proxy.is_silent = True
        one = machine(url=f"redis://127.0.0.1:{proxy.port}", **QUICK)
        found, waited_s = timed_pull(one)
        assert found == 0
        assert waited_s < BOUND_S
        assert timed_pull(one)[1] < 0.05
        assert "no answer" in one.tier.status()["last_failure"]
        # Putting does not wait for it at all, and closing does not for long.
        began = time.monotonic()
        put(one.db, PROMPT)
        assert time.monotonic() - began < 1
        wait_until(lambda: one.tier.status()["failures"])
        began = time.monotonic()
        one.db.close()
        assert time.monotonic() - began < 4


def test_it_comes_back(machine, server, caplog):
    """What could not be sent waits, and goes when the server answers again."""
    one, two = machine("one", url=server.url, **QUICK), machine("two", url=server.url, **QUICK)
    one.put(PROMPT)
    server.kill()
    put(one.db, [1, *PROMPT])
    wait_until(lambda: one.tier.status()["failures"])
    assert two.pull(PROMPT) == 0
    server.start()
    with caplog.at_level(logging.WARNING, "promptdb"):
        wait_until(lambda: one.tier.flush(1.0))
        forget_failure(two)
        assert two.pull([1, *PROMPT]) == 51
    assert any("works again" in record.message for record in caplog.records)
    assert two.pull(PROMPT) == 0  # it lost everything, which is a miss


def test_required(machine, server):
    one = machine(url=server.url, required=True, **QUICK)
    assert one.pull(PROMPT) == 0
    server.kill()
    with pytest.raises(SharedError, match="cannot be reached"):
        one.tier.pull(ROOT, [Want(pack_tokens(PROMPT))])
    with pytest.raises(SharedError, match="left alone"):
        one.tier.pull(ROOT, [Want(pack_tokens(PROMPT))])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_cut_off_in_the_middle_of_a_put(machine, server, share, monkeypatch):
    """Nothing half shows; the next try completes it."""
    monkeypatch.setattr("promptdb.far_redis.INLINE_BYTES", 100)
    monkeypatch.setattr("promptdb.far_redis.PART_BYTES", 1000)
    two = machine("two", url=server.url)
    with proxy_to(server.port) as proxy:
        one = machine("one", url=f"redis://127.0.0.1:{proxy.port}", **QUICK)
        one.far.facts()
        put(one.db, PROMPT[:1])  # a whole put, for its size
        assert one.tier.flush(WAIT_S)
        proxy.cut_after(int(share * 12_000))
        put(one.db, [9, *PROMPT])
        wait_until(lambda: one.tier.status()["failures"])
        assert two.pull([9, *PROMPT]) in (0, 16, 32, 48)
        assert two.counts.rejected == 0
        proxy._cut_after = None
        forget_failure(one)
        wait_until(lambda: one.tier.flush(1.0))
    assert two.pull([9, *PROMPT]) == 51


def test_cut_off_in_the_middle_of_a_fetch(machine, server):
    one = machine("one", url=server.url)
    one.put(PROMPT)
    with proxy_to(server.port) as proxy:
        two = machine("two", url=f"redis://127.0.0.1:{proxy.port}", **QUICK)
        two.far.facts()
        get, calls = two.far.get, []

        def cut_at_third(keys, sizes=None):
            calls.append(1)
            if len(calls) == 3:
                proxy.close()
            return get(keys, sizes)

        two.far.get = cut_at_third
        assert two.pull(PROMPT) < 50
    assert two.counts.rejected == 0


def test_a_full_server(machine, tmp_path, caplog):
    """It refuses: said once; what was put stays in the queue, and reading goes on."""
    with redis_server(tmp_path / "full", maxmemory="3mb", maxmemory_policy="noeviction") as server:
        one, two = machine("one", url=server.url, **QUICK), machine("two", url=server.url, **QUICK)
        one.put(PROMPT)
        with caplog.at_level(logging.WARNING, "promptdb"):
            for number in range(200):
                put(one.db, [number, *PROMPT])
            wait_until(lambda: one.tier.status()["failures"])
        assert "full" in one.tier.status()["last_failure"]
        assert one.tier.num_waiting()
        assert two.pull(PROMPT) == 50
        assert sum("writing" in record.message for record in caplog.records) == 1


def test_a_server_that_evicts(machine, tmp_path):
    """Under allkeys-lru anything may go at any time: what is found holds, the rest is a miss."""
    with redis_server(tmp_path / "lru", maxmemory="2500kb", maxmemory_policy="allkeys-lru") as server:
        one, two = machine("one", url=server.url), machine("two", url=server.url)
        for number in range(150):
            put(one.db, [number, *PROMPT])
        assert one.tier.flush(WAIT_S)
        assert int(one.far.facts()["evicted_keys"]) > 0
        found = [two.pull([number, *PROMPT]) for number in range(150)]
        assert max(found) == 51
        assert min(found) < 51
        assert two.counts.rejected == 0


def test_a_value_that_would_evict_everything(machine, tmp_path):
    """The server would take it, and lose all else: the client does not send it."""
    with redis_server(tmp_path / "small", maxmemory="8mb", maxmemory_policy="allkeys-lru") as server:
        far = open_far(SharedOptions(server.url))
        far.put([("v/kept", b"k" * 1000)])
        with pytest.raises(TooLargeError, match="maxmemory"):
            far.put([("v/large", bytes(9 << 20))])
        assert far.exists(["v/kept", "v/large"]) == [True, False]
        far.close()
        one = machine(url=server.url)
        one.far._most_bytes = 3000
        put(one.db, PROMPT)
        assert one.tier.flush(WAIT_S)  # it does not stay in the queue for ever
        assert one.counts.too_large > 0


def test_wrong_password_and_rights(machine, tmp_path, monkeypatch):
    users = {"user": "default off"}
    with redis_server(tmp_path / "acl", **users) as server:
        server_url = f"redis://{{}}@127.0.0.1:{server.port}"
        server.kill()
        rights = "+@read +@write +@connection +info"
        (tmp_path / "acl" / "users.acl").write_text(
            "user default off\n"
            f"user team1 on >right ~team1:* resetchannels -@all {rights}\n"
            "user reader on >right ~team1:* resetchannels -@all +@read +@connection\n"
        )
        del server.options["user"]
        server.options["aclfile"] = str(tmp_path / "acl" / "users.acl")
        server.start()
        one = machine("one", url=server_url.format("team1:right") + "?prefix=team1")
        one.put(PROMPT)
        wrong = machine("wrong", url=server_url.format("team1:wrong") + "?prefix=team1", **QUICK)
        assert timed_pull(wrong)[0] == 0
        assert "wrong user or password" in wrong.tier.status()["last_failure"]
        other = machine("other", url=server_url.format("team1:right") + "?prefix=team2", **QUICK)
        assert other.pull(PROMPT) == 0
        assert "may not do that" in other.tier.status()["last_failure"]
        monkeypatch.setenv("PROMPTDB_SHARED_PASSWORD", "right")
        reader = machine("reader", url=server_url.format("reader") + "?prefix=team1", **QUICK)
        assert reader.pull(PROMPT) == 50
        put(reader.db, [7, *PROMPT])
        wait_until(lambda: reader.tier.calls.writing.num_failures)
        assert "may not do that" in reader.tier.calls.writing.last_failure
        assert reader.pull(PROMPT) == 50


def test_tls(machine, tmp_path):
    good, expired = write_certificates(tmp_path / "good"), write_certificates(tmp_path / "expired", days=-1)
    for files, works in ((good, True), (expired, False)):
        port = free_port()
        tls = {"tls_port": str(port), "tls_cert_file": files["server"], "tls_key_file": files["server_key"]}
        with redis_server(tmp_path / f"tls{works}", port=0, tls_ca_cert_file=files["ca"], tls_auth_clients="no", **tls):
            url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={files['ca']}"
            one = machine(f"one{works}", url=url)
            put(one.db, PROMPT)
            if works:
                assert one.tier.flush(WAIT_S)
                assert machine("two", url=url).pull(PROMPT) == 50
                stranger = machine("stranger", url=f"rediss://127.0.0.1:{port}", **QUICK)
                assert stranger.pull(PROMPT) == 0
                assert "TLS" in stranger.tier.status()["last_failure"]
            else:
                assert one.pull(PROMPT) == 50  # its own
                wait_until(lambda one=one: one.tier.status()["failures"])
                assert "certificate" in one.tier.status()["last_failure"]


def test_a_slow_link(machine, server):
    """Each way takes 30 ms: a lookup costs one round trip, fetching goes in parallel."""
    machine("one", url=server.url).put(list(range(200)))
    with proxy_to(server.port) as proxy:
        two = machine("two", url=f"redis://127.0.0.1:{proxy.port}")
        two.far.facts()
        proxy.delay_s = 0.03
        found, waited_s = timed_pull(two, list(range(200)))
        assert found == 200
        assert two.counts.round_trips == 1
        assert waited_s < 1.5
        assert two.tier.calls.round_trip_s > 0.05
        # From now on, a few tokens are computed without asking.
        assert two.pull([*range(200), 1], rate=1000.0) == 200
        assert two.counts.round_trips == 1
        assert lookup(two.db, range(200)).num_tokens == 200


def test_a_cluster_fails_over(machine, tmp_path):
    """A primary dies while it is used: misses for some seconds, and then all goes on; nothing wrong is ever read."""
    with redis_cluster(tmp_path / "cluster") as nodes:
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        one, two = machine("one", url=url), machine("two", url=url)
        prompts = [[number, *PROMPT] for number in range(30)]
        for prompt in prompts[:20]:
            put(one.db, prompt)
        assert one.tier.flush(WAIT_S)
        assert sum(two.pull(prompt) == 51 for prompt in prompts[:10]) == 10
        time.sleep(0.3)  # replication is asynchronous
        nodes[0].kill()
        for prompt in prompts[20:]:
            put(one.db, prompt)
        for prompt in prompts[10:20]:
            began = time.monotonic()
            two.pull(prompt)  # checks all that it finds
            assert time.monotonic() - began < 1 + 2 * 1 + 0.5 + 2

        def all_is_there() -> bool:
            forget_failure(one)
            forget_failure(two)
            one.tier.flush(0.5)
            return not one.tier.num_waiting() and sum(two.pull(prompt) == 51 for prompt in prompts) >= 29

        wait_until(all_is_there, 40)
        assert two.counts.rejected == 0


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from archive_tools import put
from promptdb.db import PromptDB
from promptdb.shared import connect
db = PromptDB(sys.argv[1], chunk_tokens=16, shared=sys.argv[2])
connect(db)
for number in range(60):
    put(db, [number, *range(100, 150)])
    print(number, flush=True)
import time
time.sleep(60)
"""


@pytest.mark.parametrize("acknowledged", [5, 30, 59])
def test_a_killed_writer(machine, server, tmp_path, acknowledged):
    """What a process had put when it was killed arrives when the store is opened again, all of it, and whole."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "one"), server.url, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        while int(writer.stdout.readline()) < acknowledged:
            pass
        writer.kill()
    two = machine("two", url=server.url)
    for number in range(acknowledged):
        two.pull([number, *PROMPT])  # what has arrived holds
    one = machine("one", url=server.url)
    assert one.tier.flush(WAIT_S)
    assert [two.pull([number, *PROMPT]) for number in range(acknowledged)] == [51] * acknowledged
    assert two.counts.rejected == two.counts.lost == 0


def test_two_processes_with_one_store(machine, server, tmp_path):
    """Both send from one queue: one at a time, nothing twice."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "one"), server.url, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        one = machine("one", url=server.url)
        for number in range(60, 80):
            put(one.db, [number, *PROMPT])
        while int(writer.stdout.readline()) < 59:
            pass
        wait_until(lambda: not one.tier.num_waiting())
        writer.kill()
    two = machine("two", url=server.url)
    assert [two.pull([number, *PROMPT]) for number in range(80)] == [51] * 80
    assert len(two.keys()) == len(two.keys("v/")) == 80 * 4
