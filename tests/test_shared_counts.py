"""What was had of a shared store, over all processes: stat, metrics, status, and the doctor's memory of failures."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from archive_tools import put
from cli_tools import run, run_json
from far_servers import free_port
from shared_tools import PROMPT

from promptdb import PromptDB
from promptdb.format import META
from promptdb.shared_counts import SHARED_COUNTS_KEY, Counts, SharedTotals, read_shared_counts


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    for name in ("", "_SIGN", "_TRUST", "_PASSWORD", "_KEY", "_KEY_FILE"):
        monkeypatch.delenv(f"PROMPTDB_SHARED{name}", raising=False)


def stored(path):
    with PromptDB(path, readonly=True) as db, db.read() as snapshot:
        return read_shared_counts(snapshot.reader)


def test_counts_add_up_over_handles(machine, tmp_path):
    first = machine("one")
    first.put(PROMPT)
    assert first.tier.totals().counts.spans_sent == 4
    first.db.close()
    assert stored(tmp_path / "one").counts.spans_sent == 4
    for tokens in (PROMPT, [1, 2, 3]):
        reader = machine("two", readonly=True)
        reader.pull(tokens)
        reader.db.close()
    found = stored(tmp_path / "two").counts
    assert (found.lookups, found.hits, found.tokens_fetched) == (2, 1, 50)
    assert found.hit_rate == 0.5
    again = machine("two")
    again.pull([7, 7])
    assert again.tier.totals().counts.lookups == 3
    again.tier._write_counts()
    again.tier._write_counts()  # what is written is not written again
    assert stored_in(again.db).counts.lookups == again.tier.totals().counts.lookups == 3


def stored_in(db):
    with db.read() as snapshot:
        return read_shared_counts(snapshot.reader)


CHILD = """
import sys
sys.path.insert(0, sys.argv[3])
from archive_tools import ROOT
from promptdb.db import PromptDB
from promptdb.keys import pack_tokens
from promptdb.pulling import Want
from promptdb.shared import connect
with PromptDB(sys.argv[1], shared=sys.argv[2]) as db:
    for first in range(5):
        connect(db).pull(ROOT, [Want(pack_tokens([first, *range(100, 150)]))])
"""


def test_processes_at_once(machine, tmp_path):
    """Several processes with one store: no count is lost, none counted twice."""
    one = machine("one", chunk_tokens=64)
    one.put([2, *PROMPT])
    PromptDB(tmp_path / "two", chunk_tokens=64).close()
    command = [sys.executable, "-c", CHILD, str(tmp_path / "two"), f"file://{tmp_path}/far", str(Path(__file__).parent)]
    children = [subprocess.Popen(command) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    found = stored(tmp_path / "two").counts
    assert found.lookups == 15
    assert found.hits >= 1


def test_what_people_and_programs_see(machine, tmp_path):
    machine("one").put(PROMPT)
    two = machine("two")
    two.pull(PROMPT)
    two.pull([1, 2])
    two.db.close()
    url = f"file://{tmp_path}/far"
    found = run_json("shared", "status", "--db", tmp_path / "two", "--shared", url)
    assert (found["hit_rate"], found["lookups"], found["tokens_fetched"]) == (0.5, 2, 50)
    text = run("shared", "status", "--db", tmp_path / "two", "--shared", url).stdout
    assert "50% of 2 lookups" in text
    assert "50 tokens" in text
    assert run_json("stat", "--db", tmp_path / "two")["shared"]["hits"] == 1
    assert "50% of 2 lookups" in run("stat", "--db", tmp_path / "two").stdout
    pytest.importorskip("prometheus_client")
    metrics = run("metrics", "--db", tmp_path / "two").stdout
    assert "promptdb_shared_lookups_total 2.0" in metrics
    assert "promptdb_shared_hits_total 1.0" in metrics
    assert "promptdb_shared_waiting 0.0" in metrics
    with PromptDB(tmp_path / "none", shared="none") as db:
        put(db, PROMPT)
    assert run_json("stat", "--db", tmp_path / "none")["shared"]["hit_rate"] is None
    assert "shared" not in run("stat", "--db", tmp_path / "none").stdout


def test_failures_are_remembered(machine, tmp_path):
    pytest.importorskip("redis")
    one = machine("one", url=f"redis://127.0.0.1:{free_port()}", timeout_s=0.3, connect_timeout_s=0.3)
    assert one.pull(PROMPT) == 0
    one.db.close()
    found = stored(tmp_path / "one")
    assert found.failures == 1
    assert "cannot be reached" in found.last_failure
    assert abs(found.last_failure_unix_s - time.time()) < 20
    url = f"file://{tmp_path}/far"
    assert "1, the last" in run("shared", "status", "--db", tmp_path / "one", "--shared", url).stdout
    examined = run("doctor", "--db", tmp_path / "one", "--shared", url, code=1).stdout
    assert "it failed" in examined
    assert "cannot be reached" in examined


@pytest.mark.parametrize("damage", [b"", b"x" * 60])
def test_counts_that_do_not_hold(machine, tmp_path, damage):
    """They are begun anew, and `verify --fix` takes them out."""
    one = machine("one")
    one.db._index.transact(lambda writer: writer.put(META, SHARED_COUNTS_KEY, damage))
    assert stored_in(one.db) == SharedTotals()
    assert len(one.db.verify(fix=True)) == 1
    assert one.db.verify() == []
    one.db._index.transact(lambda writer: writer.put(META, SHARED_COUNTS_KEY, damage))
    one.put(PROMPT)
    one.db.close()
    assert stored(tmp_path / "one").counts == Counts(spans_sent=4, bytes_sent=one.counts.bytes_sent)
