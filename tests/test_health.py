"""The store seen from outside: what it served, metrics, doctor, durability."""

import subprocess
import sys

import endurance
import pytest
from cli_tools import run, run_json, write_checkpoint
from conftest import shared_model, shared_tokenizer
from prometheus_client.parser import text_string_to_metric_families

from promptdb import Engine, PromptDB
from promptdb.doctor import examine
from promptdb.errors import StoreError
from promptdb.format import BLOBS, META
from promptdb.metrics import exposition
from promptdb.served import LONGEST_WAIT_S, SERVED_KEY, Served, Tally

PROMPTS = [[*range(5, 45), number] for number in range(100, 104)]
WORDS = " ".join(f"word number {number}" for number in range(20))


def levels(path):
    return {finding.level for finding in examine(path)}


def saying(path, text):
    return [finding for finding in examine(path) if text in finding.what]


# What was served


def test_engines_count_what_they_serve(store_path):
    with PromptDB(store_path) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        engine.get(PROMPTS[0])
        engine.get(PROMPTS[1])
        list(engine.run(PROMPTS))
        engine.get(PROMPTS[3])
        engine.flush()
        weights_id = engine.root.weights_id
        (served,) = db.served().values()
        assert (served.num_prompts, served.num_complete) == (7, 3)
        assert served.tokens_loaded + served.tokens_computed == 7 * 41
        distinct = 40 + 4
        again = 1  # after the first prompt, the logits at the branch are not stored
        assert distinct <= served.tokens_computed <= distinct + again
        assert served.compute_s > 0
        assert served.load_s > 0
    with PromptDB(store_path, readonly=True) as db:
        assert db.served() == {weights_id: served}  # it was written when the store was closed
        assert db.verify() == []


def test_counts_add_up_over_handles_and_wait_at_most_a_minute(store_path):
    now = [1000.0]
    one = "ab" * 32
    with PromptDB(store_path, clock=lambda: now[0]) as db, PromptDB(store_path, readonly=True) as other:
        db.count_served(one, Served(num_prompts=1, tokens_loaded=10))
        assert other.served() == {}
        assert db.served()[one].tokens_loaded == 10
        now[0] += LONGEST_WAIT_S + 1
        db.count_served(one, Served(num_prompts=1, load_s=0.5))
        assert other.served() == {one: Served(num_prompts=2, tokens_loaded=10, load_s=0.5)}
        other.count_served(one, Served(num_prompts=100))
        assert other.served()[one].num_prompts == 2  # who may only read counts nothing


def test_counts_that_do_not_hold_are_found_and_begun_anew(store_path):
    one = "ab" * 32
    with PromptDB(store_path) as db:
        db.count_served(one, Served(num_prompts=1))
    with PromptDB(store_path) as db:
        db._index.transact(lambda writer: writer.put(META, SERVED_KEY + bytes.fromhex(one), b"x" * 40))
        assert db.served() == {}
        assert [problem.table for problem in db.verify()] == [META]
        db.verify(fix=True)
        assert db.verify() == []
        db._index.transact(lambda writer: writer.put(META, SERVED_KEY + bytes.fromhex(one), b"x" * 40))
        db.count_served(one, Served(num_prompts=5))
        db.flush_accesses()
        assert db.served()[one].num_prompts == 5


def test_damage_is_counted(store_path):
    with PromptDB(store_path) as db:
        with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
            engine.get(PROMPTS[0])

        def damage(writer):
            key = next(key for key, _ in writer.scan(BLOBS) if key.endswith(b"kv"))
            value = bytearray(writer.get(BLOBS, key))
            value[-1] ^= 1
            writer.put(BLOBS, key, bytes(value))

        db._index.transact(damage)
        db._verified._seen.clear()
        with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
            engine.get([*PROMPTS[0], 7])
        (served,) = db.served().values()
        assert served.num_quarantined == 1
    assert saying(store_path, "damaged spans were taken out")[0].level == "warning"


def test_seconds_saved():
    assert Served(tokens_loaded=1000, load_s=1.0, tokens_computed=100, compute_s=2.0).saved_s(None) == 19.0
    assert Served(tokens_loaded=1000, load_s=1.0).saved_s(100.0) == 9.0
    assert Served(tokens_loaded=1000, load_s=1.0).saved_s(None) is None
    assert Served().saved_s(None) == 0.0
    assert Served(tokens_loaded=1, load_s=1.0).saved_s(100.0) == 0.0  # never negative


def test_what_cannot_be_written_waits():
    tally = Tally()
    assert not tally.add("a", Served(num_prompts=1), 5.0)
    taken = tally.take()
    assert tally.take() == {}
    tally.add("a", Served(num_prompts=2), 6.0)
    tally.put_back(taken)
    assert tally.take() == {"a": Served(num_prompts=3)}


# Metrics


def test_metrics_are_what_prometheus_reads(store_path):
    with PromptDB(store_path, quota_bytes=10**9) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        list(engine.run(PROMPTS))
        engine.flush()
        families = {family.name: family for family in text_string_to_metric_families(exposition(db))}
        stat = db.stat()
        weights_id = engine.root.weights_id
    values = {name: family.samples[0].value for name, family in families.items() if family.samples}
    assert values["promptdb_spans"] == stat["num_nodes"] > 0
    assert values["promptdb_charged_bytes"] == stat["charged_bytes"]
    assert values["promptdb_quota_bytes"] == 10**9
    assert values["promptdb_evicted_spans"] == 0
    assert families["promptdb_evicted_spans"].type == "counter"
    (sample,) = families["promptdb_computed_tokens"].samples
    assert (sample.value, sample.labels["weights_id"]) == (44, weights_id)
    text = run("metrics", "--db", store_path).stdout
    assert {family.name for family in text_string_to_metric_families(text)} == set(families)


def test_stat_shows_what_was_served(tmp_path):
    store, model = tmp_path / "store", write_checkpoint(tmp_path / "model")
    run("put", "--db", store, "--model", model, WORDS)
    run("put", "--db", store, "--model", model, WORDS)
    found = run_json("stat", "--db", store)
    assert (found["num_prompts"], found["num_complete"]) == (2, 1)
    assert found["loaded_share"] == 0.5
    assert found["saved_s"] >= 0
    text = run("stat", "--db", store).stdout
    assert "2 prompts, 50% of them complete" in text
    assert "50% of all" in text


# Doctor


def test_a_healthy_store(store_path):
    with PromptDB(store_path, quota_bytes=1 << 20):
        pass
    assert levels(store_path) <= {"ok", "note"}
    assert run("doctor", "--db", store_path).exit_code == 0
    assert run_json("doctor", "--db", store_path)["findings"][0].keys() == {"level", "what", "hint"}


def test_what_doctor_warns_of(store_path):
    with PromptDB(store_path):
        pass
    assert saying(store_path, "no quota")[0].level == "note"
    store_path.chmod(0o755)
    assert saying(store_path, "others may enter")[0].level == "warning"
    assert run("doctor", "--db", store_path, code=1).stdout.splitlines()[0].split()[0] == "warning"
    store_path.chmod(0o700)
    with PromptDB(store_path) as db:
        db.set_quota(10**18)
    assert saying(store_path, "lets the file grow")[0].level == "warning"


def test_no_store_is_an_error(tmp_path):
    assert examine(tmp_path / "nowhere")[0].level == "error"
    assert "there is no store" in run("doctor", "--db", tmp_path / "nowhere", code=2).stdout


def test_snapshots_that_hold_old_pages(store_path):
    script = """
import sys, time
from promptdb import PromptDB
with PromptDB(sys.argv[1], readonly=True) as db, db.read():
    print("ready", flush=True)
    sys.stdin.readline()
"""
    with PromptDB(store_path) as db:
        command = [sys.executable, "-c", script, str(store_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        assert saying(store_path, "hold snapshots that") == []
        for number in range(101):
            db.set_ttl(1000.0 + number)
        (finding,) = saying(store_path, "hold snapshots that")
        assert str(process.pid) in finding.what
        assert "101 transactions" in finding.what
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        assert saying(store_path, "processes that have died")
    with PromptDB(store_path):  # whoever opens it for writing clears them
        assert saying(store_path, "processes that have died") == []


def test_versions_that_do_not_fit(store_path, monkeypatch):
    import promptdb.doctor

    with PromptDB(store_path) as db, Engine(db, shared_model("llama"), shared_tokenizer()):
        pass
    assert saying(store_path, "was last run with") == []
    real = promptdb.doctor._installed
    versions = {"torch": "2.10.1", "transformers": None}
    monkeypatch.setattr(promptdb.doctor, "_installed", lambda name: versions.get(name, real(name)))
    assert saying(store_path, "torch 2.10.1 is too old")[0].level == "error"
    assert saying(store_path, "transformers is not installed")
    assert "torch" in saying(store_path, "was last run with")[0].what


# Durability


@pytest.mark.parametrize("durability", ["power", "recent", "process"])
def test_durability(store_path, durability):
    with PromptDB(store_path, durability=durability) as db:
        flags = db._index._environment.env.flags()
        assert (flags["sync"], flags["metasync"]) == (durability != "process", durability == "power")
        db.set_ttl(5.0)
        with PromptDB(store_path, durability=durability) as other, PromptDB(store_path, readonly=True) as reader:
            assert other.ttls() == reader.ttls() == {"": 5.0}
        wrong = "power" if durability != "power" else "process"
        with pytest.raises(StoreError, match="open in this process with durability"):
            PromptDB(store_path, durability=wrong)
    with PromptDB(store_path) as db:
        assert db.ttls() == {"": 5.0}
    with pytest.raises(StoreError, match="durability is 'none'"):
        PromptDB(store_path, durability="none")


# What is logged


def test_log_records_have_fields(store_path, caplog):
    with PromptDB(store_path) as db:
        with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
            engine.get(PROMPTS[0])
            weights_id = engine.root.weights_id
        (node,) = [node for node, _ in db.nodes()]
        db._index.transact(lambda writer: writer.put(BLOBS, node + b"kv", b"x" * 100))
        db._verified._seen.clear()
        with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
            engine.get([*PROMPTS[0], 7])
    (record,) = [record for record in caplog.records if record.name == "promptdb"]
    assert (record.event, record.node, record.weights_id) == ("damage", node.hex(), weights_id)
    assert record.levelname == "WARNING"
    assert "computed again" in record.getMessage()


# Pages


def test_verify_looks_at_the_pages_before_it_opens_the_file(tmp_path):
    endurance.fill(tmp_path / "store", prompts=20)
    data = tmp_path / "store" / "data.mdb"
    found = run_json("verify", "--db", tmp_path / "store")
    assert (found["is_sound"], found["pages_checked"]) == (True, True)
    with PromptDB(tmp_path / "store"):
        assert run_json("verify", "--db", tmp_path / "store")["pages_checked"] is False
        assert "others have the store open" in run("verify", "--db", tmp_path / "store").stdout
    content = bytearray(data.read_bytes())
    for leaf in endurance.page_kinds(content)["leaf"]:  # some are not in use
        content[leaf * 4096 + 12 : leaf * 4096 + 16] = b"\xff" * 4  # where its free space begins and ends
    data.write_bytes(content)
    result = run("verify", "--db", tmp_path / "store", code=1)
    assert "the pages of" in result.stderr
    assert "restore the store" in result.stderr
