"""The token trie, on small stores whose content is written out."""

import pytest

from promptdb.db import PromptDB
from promptdb.errors import CorruptDataError
from promptdb.format import CHILDREN
from promptdb.keys import Root, child_key, pack_tokens, prefix_digests
from promptdb.testing import encode_tokens
from promptdb.trie import children, descendants, match

ROOT = Root("aa" * 32, "bb" * 32)


@pytest.fixture
def db():
    with PromptDB.in_memory(chunk_tokens=8) as db:
        yield db
        assert db.verify() == []


def put(db, tokens, boundaries=(), chunk_tokens=8, start=None, root=ROOT):
    packed = pack_tokens(tokens)
    if start is None:
        start = db.lookup(
            tokens, model=root.weights_id, tokenizer=root.tokenizer_id, namespace=root.namespace
        ).num_tokens
    return db.put(root, packed, start, encode_tokens(packed, boundaries, chunk_tokens))


def steps(db, tokens):
    found = db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id)
    return [(step.start, step.num_tokens, step.span_tokens) for step in found.steps]


def test_nothing_is_found_in_nothing(db):
    assert steps(db, []) == []
    assert steps(db, [1, 2]) == []


def test_spans_are_cut_at_boundaries_and_chunks(db):
    put(db, range(20), boundaries=[3, 8, 12])
    assert steps(db, range(20)) == [(0, 3, 3), (3, 5, 5), (8, 4, 4), (12, 4, 4), (16, 4, 4)]


def test_an_edge_is_used_in_part(db):
    put(db, range(20))
    assert steps(db, [*range(11), 99]) == [(0, 8, 8), (8, 3, 8)]
    assert steps(db, range(5)) == [(0, 5, 8)]


def test_suffixes_attach_in_the_middle_of_an_edge(db):
    put(db, range(8))
    report = put(db, [0, 1, 2, 50, 51])
    assert (report.num_spans, report.num_tokens) == (1, 2)
    assert steps(db, [0, 1, 2, 50, 51, 52]) == [(0, 3, 8), (3, 2, 2)]
    assert steps(db, range(8)) == [(0, 8, 8)]  # untouched


def test_different_cuts_of_one_prompt_meet(db):
    put(db, range(16), boundaries=[5])
    assert put(db, range(16), boundaries=[1, 2, 3]).num_spans == 0
    assert put(db, range(18), boundaries=[1, 2, 3, 17]).num_tokens == 2
    assert db.stat()["num_tokens"] == 18


@pytest.mark.parametrize("first_token", [0, 1, 255, 256, 2**31, 2**32 - 1])
def test_many_children_of_one_prefix(db, first_token):
    """Any number of siblings costs nothing and hides nothing, the first and last in order included."""
    for token in {*range(0, 2**32, 2**26), 1, 2, 255, 256, 257, 2**32 - 2, first_token}:
        put(db, [7, token, 9])
    assert sum(count for _, count, _ in steps(db, [7, first_token, 9, 1])) == 3


def test_long_spans_that_part_late(db):
    """Spans of hundreds of tokens that agree in all but the last."""
    for last in range(20):
        put(db, [*range(400), last], chunk_tokens=1000)
    for last in range(20):
        assert sum(count for _, count, _ in steps(db, [*range(400), last])) == 401
    assert db.stat()["num_tokens"] == 420


def test_writer_that_comes_late_leaves_what_is_there(db):
    """Both looked up an empty store; the second put finds that all, a part, or more than its own is stored."""
    assert put(db, range(10), boundaries=[4], start=0).num_tokens == 10
    assert put(db, range(10), boundaries=[7], start=0).num_tokens == 0
    assert put(db, range(14), boundaries=[2, 9], start=0).num_tokens == 4
    assert put(db, range(3), start=0).num_tokens == 0
    assert steps(db, range(14)) == [(0, 4, 4), (4, 4, 4), (8, 2, 2), (10, 4, 4)]


def test_spans_without_their_prefix_are_dropped(db):
    """Somebody removed the prefix meanwhile: what stands on nothing would never be found."""
    report = put(db, range(16), start=8)
    assert (report.num_spans, report.num_dropped) == (0, 1)
    assert db.stat()["num_nodes"] == 0


def test_removing_takes_what_stands_on_it(db):
    put(db, range(24))
    put(db, [*range(10), 50, 51, *range(20)])
    put(db, [90, 91])
    node = db.lookup(range(24), model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps[1].node
    db.remove(node)
    assert steps(db, range(24)) == [(0, 8, 8)]
    assert steps(db, [90, 91]) == [(0, 2, 2)]
    assert db.stat()["num_tokens"] == 10


def only(db, tokens, step):
    node = db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps[step].node
    assert db.remove(node, only=True) == 1
    return node


def test_orphans_are_reached_again_when_their_prefix_returns(db):
    put(db, range(24))
    only(db, range(24), 0)
    assert steps(db, range(24)) == []
    assert put(db, range(24)).num_tokens == 8
    assert steps(db, range(24)) == [(0, 8, 8), (8, 8, 8), (16, 8, 8)]


def test_orphans_that_a_new_cut_overlaps(db):
    """The new prefix ends where an orphan starts, and the next new span would run across that orphan's end.

    The put was once given up with nothing stored, for good: the part before the orphan was lost when the rest was
    encoded again.
    """
    put(db, range(20), boundaries=[8, 16], chunk_tokens=100)
    only(db, range(20), 2)
    only(db, range(20), 0)
    report = put(db, range(20), boundaries=[8], chunk_tokens=100, start=0)
    assert (report.num_tokens, report.num_dropped) == (12, 0)
    assert steps(db, range(20)) == [(0, 8, 8), (8, 8, 8), (16, 4, 4)]


def test_removing_from_under_a_prefix_that_was_cut_anew(db):
    """A span whose recorded parent is gone is found through the tree, and takes what stands on it along."""
    put(db, range(24))
    only(db, range(24), 0)
    put(db, range(8), boundaries=[3])
    assert steps(db, range(24)) == [(0, 3, 3), (3, 5, 5), (8, 8, 8), (16, 8, 8)]
    node = db.lookup(range(24), model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps[2].node
    assert db.remove(node) == 2
    assert db.stat()["num_tokens"] == 8


def test_removing_an_orphan(db):
    put(db, range(24))
    orphan = db.lookup(range(24), model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps[1].node
    only(db, range(24), 0)
    assert db.remove(orphan) == 1  # what stands on it cannot be found without the tokens before it
    assert db.stat()["num_nodes"] == 1


def test_children_and_descendants(db):
    put(db, range(16))
    put(db, [*range(4), 70, 71])
    put(db, [*range(8), 60])
    put(db, [*range(12), 50, 51])
    with db.read() as snapshot:
        reader, packed = snapshot.reader, pack_tokens(range(8))
        (start, end) = prefix_digests(ROOT.digest, packed, [0, 8])
        assert [span for _, span in children(reader, start)] == [packed]
        assert [span for _, span in children(reader, end)] == [pack_tokens(range(8, 16)), pack_tokens([60])]
        below = {(start, tokens) for start, _, tokens in descendants(reader, ROOT.digest, packed, 0)}
        assert below == {
            (4, pack_tokens([*range(4), 70, 71])),
            (8, pack_tokens(range(16))),
            (8, pack_tokens([*range(8), 60])),
            (12, pack_tokens([*range(12), 50, 51])),
        }
        everything = list(descendants(reader, ROOT.digest, b"", -1))
        assert len(everything) == db.stat()["num_nodes"] == 5


@pytest.mark.parametrize("entry", [b"", bytes(32), bytes(33), bytes(35), bytes(32) + pack_tokens([9, 1])])
def test_damaged_entries_are_noticed(entry):
    db = PromptDB.in_memory()
    put(db, [1, 2])
    (start,) = prefix_digests(ROOT.digest, b"", [0])
    db._index.transact(lambda writer: writer.put(CHILDREN, child_key(start, pack_tokens([1])), entry))
    with pytest.raises(CorruptDataError), db.read() as snapshot:
        match(snapshot.reader, ROOT.digest, pack_tokens([1, 2]))
    assert [problem.table for problem in db.verify()] == [CHILDREN]


def test_namespaces_do_not_meet(db):
    put(db, range(8))
    put(db, range(4), root=Root("aa" * 32, "bb" * 32, "tenant"))
    assert steps(db, range(8)) == [(0, 8, 8)]
    assert db.stat()["num_tokens"] == 12
    assert db.stat()["num_roots"] == 2
