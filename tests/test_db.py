"""PromptDB: what it finds, counts and writes, and what it refuses."""

import shutil
from pathlib import Path

import lmdb
import pytest
from db_tools import ROOT, lookup, mounted, put, read_tokens

from promptdb import PromptDB
from promptdb.commits import SpanPayload
from promptdb.errors import (
    InputTypeError,
    NodeNotFoundError,
    PromptError,
    StoreError,
    StoreFullError,
    TokenRangeError,
)
from promptdb.format import (
    BLOBS,
    LOGITS,
    NODES,
    TABLES,
)
from promptdb.keys import Root, pack_tokens
from promptdb.snapshot import Snapshot, Verified
from promptdb.testing import scratch_directory

# A full disk


def fill(db):
    """Put prompts until the disk is full; return how many fitted."""
    for first in range(10_000):
        try:
            put(db, [first, *range(2000)])
        except StoreFullError:
            return first
    raise AssertionError("the disk did not fill")


def test_full_disk(tmp_path):
    """The put that does not fit fails whole; what was stored stays readable, and writable once there is room."""
    with mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path):
        ballast = tmp_path / "ballast"
        ballast.write_bytes(bytes(2 << 20))
        with PromptDB(tmp_path / "store", map_bytes=1 << 26, policy="ttl") as db:  # which evicts nothing
            stored = fill(db)
            assert 10 < stored < 10_000
            assert db.verify() == []
            assert db.stat()["num_tokens"] == stored * 2001
            for first in range(stored):
                assert read_tokens(db, [first, *range(2000)]) == pack_tokens([first, *range(2000)])
            assert lookup(db, [stored, *range(2000)]).num_tokens == 0
            with pytest.raises(StoreFullError, match=r"no space left.*still readable") as caught:
                put(db, [stored, *range(2000)])
            assert isinstance(caught.value, OSError)
            ballast.unlink()
            put(db, [stored, *range(2000)])
            assert lookup(db, [stored, *range(2000)]).num_tokens == 2001
            assert db.verify() == []
        with PromptDB(tmp_path / "store") as db:
            assert db.stat()["num_tokens"] == (stored + 1) * 2001


def test_full_disk_at_creation(tmp_path):
    with mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path):
        (tmp_path / "ballast").write_bytes(bytes(56 << 10))
        with pytest.raises(StoreFullError):
            PromptDB(tmp_path / "store")


def test_full_store_is_freed_by_removing(tmp_path):
    with (
        mounted("-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path),
        PromptDB(tmp_path / "store", policy="ttl") as db,
    ):
        stored = fill(db)
        assert stored > 20
        for victim in range(stored // 2):
            db.remove(lookup(db, [victim, *range(2000)]).steps[0].node)
        for victim in range(stored // 4):
            put(db, [victim, *range(2000)])
        assert db.verify() == []


# Lookups


@pytest.mark.parametrize(
    ("tokens", "error"),
    [([-1], TokenRangeError), ([2**32], TokenRangeError), (["a"], InputTypeError), (5, InputTypeError),
     ("ab", InputTypeError), ([1.5], InputTypeError), (b"abc", PromptError)],
)  # fmt: skip
def test_tokens_that_cannot_be(db, tokens, error):
    with pytest.raises(error):
        lookup(db, tokens)


@pytest.mark.parametrize("name", ["model", "tokenizer", "namespace", "intervention"])
@pytest.mark.parametrize("value", [None, 3, b"aa", ["aa"]], ids=str)
def test_identities_of_another_type(db, name, value):
    with pytest.raises(InputTypeError):
        db.lookup([1], **{"model": "aa", "tokenizer": "bb", name: value})


def test_lookup_says_whether_logits_are_there(db):
    put(db, range(40), logits=[20, 40])
    assert lookup(db, range(40)).is_complete
    assert not lookup(db, range(41)).is_complete
    assert lookup(db, range(20)).is_complete
    assert not lookup(db, range(19)).has_logits
    assert not lookup(db, []).is_complete


@pytest.mark.parametrize("on_disk", [True, False])
def test_nodes_may_be_removed_while_they_are_listed(on_disk):
    """A walk over all nodes holds nothing between them: writing meanwhile is allowed."""
    directory = scratch_directory()
    with PromptDB(directory / "store", chunk_tokens=1) if on_disk else PromptDB.in_memory(chunk_tokens=1) as db:
        put(db, range(600))
        assert [node for node, _ in db.nodes()] == sorted({node for node, _ in db.nodes()})
        seen = 0
        for node, record in db.nodes():
            assert record.num_tokens == 1
            db.remove(node, only=True)
            seen += 1
        assert seen == 600
        assert db.stat()["num_nodes"] == 0
        assert db.verify() == []
    shutil.rmtree(directory)


def test_find_node(db):
    put(db, range(60))
    nodes = [node for node, _ in db.nodes()]
    for node in nodes:
        assert db.find_node(node.hex()) == node
        assert db.find_node(node.hex().upper()[:17]) == node
    for wrong in ("", "zz", "a b", "é", "00" * 32, nodes[0].hex() + "0", nodes[0].hex() + "00"):
        with pytest.raises(NodeNotFoundError) as caught:
            db.find_node(wrong)
        assert isinstance(caught.value, KeyError)


def test_find_node_by_odd_digits():
    with PromptDB.in_memory() as db:
        for first in range(100):
            put(db, [first])
        nodes = sorted(node.hex() for node, _ in db.nodes())
        for length in (1, 3, 5):
            for prefix in {node[:length] for node in nodes}:
                matching = [node for node in nodes if node.startswith(prefix)]
                if len(matching) == 1:
                    assert db.find_node(prefix).hex() == matching[0]
                else:
                    with pytest.raises(NodeNotFoundError, match="several"):
                        db.find_node(prefix)


def test_a_snapshot_of_a_writer_sees_what_is_written(db):
    put(db, range(10))
    ((node, record),) = db.nodes()

    def work(writer):
        snapshot = Snapshot(writer, Verified("always"))
        changed = record._replace(compute_s=9.0)
        for each in (record, changed, record):
            writer.put(NODES, node, each.pack(node))
            assert snapshot.record(node) == snapshot.record(node) == each
        writer.delete(NODES, node)
        assert snapshot.record(node) is None
        writer.put(NODES, node, record.pack(node))

    db._index.transact(work)


# Writing


def test_totals_are_exact(db):
    other = Root("aa" * 32, "bb" * 32, "tenant")
    report = put(db, range(40), logits=[40, 7])
    put(db, [*range(10), 99], logits=[11])
    put(db, range(5), root=other)
    assert report.num_spans == 3
    assert report.num_tokens == 40
    totals = dict(db.roots())
    assert totals[ROOT]["num_tokens"] == 41
    assert totals[other] == {"num_nodes": 1, "num_tokens": 5, "blob_bytes": totals[other]["blob_bytes"]}
    with db.read() as snapshot:
        held = sum(len(value) for table in (BLOBS, LOGITS) for _, value in snapshot.reader.scan(table))
    assert db.stat()["blob_bytes"] == held
    assert db.stat()["num_logits"] == 3
    assert put(db, range(40), logits=[40, 7]).num_bytes == 0
    assert dict(db.roots()) == totals
    assert db.verify() == []
    db.remove(lookup(db, range(40)).steps[0].node)
    assert ROOT not in dict(db.roots())
    assert dict(db.roots())[other] == totals[other]
    assert db.stat()["num_logits"] == 0


def test_spans_without_blobs_are_counted():
    with PromptDB.in_memory() as db:
        db.put(ROOT, pack_tokens(range(3)), 0, lambda start: [SpanPayload(0, 3, (), {}, 0.0, {})])
        assert db.stat()["num_nodes"] == 1
        assert db.verify() == []


def test_logits_of_what_is_stored_already(db):
    put(db, range(20))
    assert put(db, range(20), logits=[20]).num_spans == 0
    assert lookup(db, range(20)).is_complete
    assert read_logits_at(db, 20) == bytes(16)


def read_logits_at(db, position):
    from promptdb.keys import prefix_digests

    with db.read() as snapshot:
        (digest,) = prefix_digests(ROOT.digest, pack_tokens(range(position)), [position])
        return bytes(snapshot.logits(digest).data)


@pytest.mark.parametrize("position", [0, -1, 4])
def test_logits_at_no_position(db, position):
    with pytest.raises(PromptError, match="logits after"):
        put(db, range(3), logits=[position])
    assert db.stat()["num_nodes"] == 0


def spans(*bounds):
    return lambda start: [SpanPayload(begin, end, (), {}, 0.0, {}) for begin, end in bounds]


@pytest.mark.parametrize(
    "bounds", [[(0, 9)], [(1, 4)], [(0, 2), (3, 4)], [(0, 2), (1, 4)], [(0, 0)], [(2, 1)], [(-1, 4)]], ids=str
)
def test_spans_that_do_not_tile(db, bounds):
    with pytest.raises(PromptError, match="do not tile"):
        db.put(ROOT, pack_tokens(range(4)), 0, spans(*bounds))
    assert db.stat()["num_nodes"] == 0


def test_odd_bytes_are_no_prompt(db):
    with pytest.raises(PromptError, match="no packed tokens"):
        db.put(ROOT, b"abc", 0, spans())


def test_nothing_to_put(db):
    assert db.put(ROOT, b"", 0, spans()).num_spans == 0
    assert db.stat()["num_roots"] == 0


def test_removing_what_is_not_there(db):
    with pytest.raises(NodeNotFoundError):
        db.remove(bytes(32))


def test_a_put_that_fails_leaves_nothing(db):
    put(db, range(10))
    before = db.stat()
    payload = SpanPayload(10, 20, (), {"tokens": bytes(1 << 16), "bad": "text"}, 0.0, {})
    with pytest.raises(TypeError):
        db.put(ROOT, pack_tokens(range(20)), 10, lambda start: [payload])
    assert {**db.stat(), "file_bytes": 0} == {**before, "file_bytes": 0}
    assert lookup(db, range(20)).num_tokens == 10


def test_writing_inside_a_read_is_refused(db):
    with db.read(), pytest.raises(StoreError, match="cannot write while it reads"):
        put(db, [1])


def test_closed_store(store_path):
    db = PromptDB(store_path)
    put(db, [1])
    db.close()
    db.close()
    for use in (lambda: lookup(db, [1]), lambda: put(db, [2]), db.stat, db.verify, lambda: list(db.nodes()), db.roots):
        with pytest.raises(StoreError, match="closed"):
            use()
    memory = PromptDB.in_memory()
    memory.close()
    with pytest.raises(StoreError, match="closed"):
        lookup(memory, [1])


def test_handles_of_one_process_share_the_store(store_path):
    first, second = PromptDB(store_path), PromptDB(str(store_path))
    put(first, [1, 2])
    assert lookup(second, [1, 2]).num_tokens == 2
    first.close()
    put(second, [3])
    link = store_path.parent / "link"
    link.symlink_to(store_path)
    with PromptDB(link) as third:
        assert lookup(third, [3]).num_tokens == 1
    second.close()


def test_a_store_that_was_deleted_and_made_again(store_path):
    """A handle that was left open on the deleted one must not be taken for the new one."""
    old = PromptDB(store_path)
    put(old, [1])
    shutil.rmtree(store_path)
    with PromptDB(store_path) as new:
        assert lookup(new, [1]).num_tokens == 0
        put(new, [2])
        assert (store_path / "data.mdb").stat().st_size > 0
    with PromptDB(store_path) as again:
        assert lookup(again, [2]).num_tokens == 1
    old.close()


def test_the_map_grows_for_a_blob_larger_than_itself(store_path):
    blob = bytes(8 << 20)
    with PromptDB(store_path, map_bytes=1) as db:
        db.put(ROOT, pack_tokens([1]), 0, lambda start: [SpanPayload(0, 1, (), {"x": blob}, 0.0, {})])
        assert db.stat()["map_bytes"] > 8 << 20
        assert db.stat()["blob_bytes"] == len(blob)
    with PromptDB(store_path, map_bytes=1) as db:
        assert db.stat()["blob_bytes"] == len(blob)


def test_registry(store_path):
    with PromptDB(store_path) as db:
        registry = db.registry
        assert registry.model("aa" * 32) is None
        assert registry.checkpoint(b"file") is None
        registry.update_rates("aa" * 32, load_bytes_per_s=1.0)  # of a model that nobody knows: nothing
        registry.add_model("aa" * 32, {"name": "first"})
        registry.add_model("aa" * 32, {"name": "second"})
        registry.update_rates("aa" * 32, load_bytes_per_s=100.0)
        registry.update_rates("aa" * 32, load_bytes_per_s=200.0, compute_tokens_per_s=5.0)
        registry.add_tokenizer("bb" * 32, {"json": "{}"})
        registry.add_tokenizer("bb" * 32, {"json": "[]"})
        registry.add_checkpoint(b"file", {"weights_id": "1"})
        registry.add_checkpoint(b"file", {"weights_id": "2"})
    with PromptDB(store_path, readonly=True) as db:
        model = db.registry.models()["aa" * 32]
        assert model["name"] == "first"
        assert model["load_bytes_per_s"] == pytest.approx(130.0)
        assert model["compute_tokens_per_s"] == 5.0
        assert db.registry.tokenizers() == {"bb" * 32: {"json": "{}"}}
        assert db.registry.tokenizer("bb" * 32) == {"json": "{}"}
        assert db.registry.checkpoint(b"file") == {"weights_id": "2"}
        assert db.verify() == []


def test_tables_have_the_names_of_the_format(store_path):
    with PromptDB(store_path):
        pass
    env = lmdb.open(str(store_path), max_dbs=32, readonly=True)
    with env.begin() as transaction:
        assert {key.decode() for key, _ in transaction.cursor()} == set(TABLES)
    env.close()
    assert Path(store_path, "data.mdb").exists()
