"""Pins and tags: what stays however full the store is."""

import math

import pytest
from limits_tools import ROOT, a_clock, dated_db, found, lives, put  # noqa: F401 - fixtures

from promptdb.errors import (
    InputTypeError,
    NodeNotFoundError,
    QuotaExceededError,
    StoreError,
)

DAY = 86400.0


def test_a_pin_holds_a_path_until_it_ends(db, clock):
    put(db, range(48), ttl_s=DAY)
    put(db, [*range(20), 7], ttl_s=DAY)
    label = db.pin(ROOT, range(33), name="mine")
    assert (label.kind, label.name, label.num_tokens) == ("pin", "mine", 48)
    assert label.expires_unix_s == clock.now + 30 * DAY
    assert db.pins() == [label]
    assert db.usage()["pinned_bytes"] == sum(life.size_bytes for life in lives(db).values() if life.pinned_unix_s)
    clock.now += 20 * DAY
    assert found(db, range(48)) == 48  # though its time has come
    db.gc(0)
    assert found(db, range(48)) == 48
    assert found(db, [*range(20), 7]) == 20
    clock.now += 11 * DAY
    assert db.pins() == []
    assert found(db, range(48)) == 0
    assert db.gc(0).num_expired == 3
    assert db.usage()["pinned_bytes"] == 0


def test_a_pin_taken_off(db, clock):
    put(db, range(48))
    first, second = db.pin(ROOT, range(48), expires_s=100.0), db.pin(ROOT, range(20), expires_s=50.0, name="é")
    assert db.unpin(node=first.node) == 1
    db.gc(0)
    assert found(db, range(48)) == 32
    assert db.unpin(name="é") == 1
    assert db.unpin(name="é") == db.unpin(node=second.node) == 0
    assert db.gc(0).num_evicted == 2
    with pytest.raises(StoreError, match="no pin is named"):
        db.unpin()


def test_a_pin_put_again_replaces_the_one_before(db, clock):
    put(db, range(16))
    db.pin(ROOT, range(16), expires_s=1000.0)
    db.pin(ROOT, range(16), expires_s=10.0)
    assert len(db.pins()) == 1
    clock.now += 20
    assert db.gc(0).num_evicted == 1


def test_pins_that_fill_the_quota_are_named(db, clock):
    db.set_quota(30_000)
    put(db, [1], size=10_000)
    put(db, [2], size=10_000)
    db.pin(ROOT, [1])
    db.pin(ROOT, [2])
    pinned = db.usage()["pinned_bytes"]
    with pytest.raises(QuotaExceededError, match=rf"{pinned:,} bytes are pinned") as error:
        put(db, [3], size=10_000)
    assert "promptdb unpin" in error.value.hint
    assert [found(db, [first]) for first in (1, 2, 3)] == [1, 1, 0]
    with pytest.raises(QuotaExceededError, match="pinned"):
        db.set_quota(1000)
    assert db.limits().quota_bytes == 30_000
    clock.now += 31 * DAY
    put(db, [3], size=10_000)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"expires_s": 0}, StoreError), ({"expires_s": math.inf}, StoreError), ({"expires_s": None}, InputTypeError),
     ({"expires_s": "1d"}, InputTypeError), ({"name": 7}, InputTypeError), ({"name": "x" * 401}, StoreError),
     ({"name": "a\nb"}, StoreError), ({"name": "\ud800"}, StoreError)],
    ids=ascii,
)  # fmt: skip
def test_pins_that_cannot_be(db, options, error):
    put(db, range(16))
    with pytest.raises(error):
        db.pin(ROOT, range(16), **options)
    assert db.pins() == []


def test_nothing_to_pin(db, clock):
    put(db, [1], ttl_s=1.0)
    node, _ = next(db.nodes())
    clock.now += 2
    for pin in (
        lambda: db.pin(ROOT, [1]),
        lambda: db.pin(ROOT, []),
        lambda: db.pin_node(node),
        lambda: db.pin_node(bytes(32)),
    ):
        with pytest.raises(NodeNotFoundError):
            pin()


def test_tags(db, clock):
    put(db, range(40))
    put(db, [*range(16), 99])
    put(db, [5])
    db.tag("lines é", ROOT, range(40))
    db.tag("lines é", ROOT, [5])
    db.tag("other", ROOT, [*range(16), 99], expires_s=10.0)
    assert {label.name for label in db.tags()} == {"lines é", "other"}
    assert sorted(label.num_tokens for label in db.tags("lines é")) == [1, 40]
    assert len(db.tagged("lines é")) == 4
    assert len(db.tagged("other")) == 2
    assert db.tagged("nobody's") == set()
    clock.now += 11
    assert [label.name for label in db.tags("other")] == []
    assert db.tagged("other") == set()
    db.gc(0)  # a tag holds nothing
    assert db.tags() == []
    put(db, [5])
    assert db.untag("lines é") == 0  # gc took them with their spans
    db.tag("again", ROOT, [5])
    assert db.untag("again") == 1
    with pytest.raises(StoreError, match="the name is empty"):
        db.tag("", ROOT, [5])


def test_what_is_removed_by_hand_loses_its_pins(db):
    put(db, range(48))
    db.pin(ROOT, range(48))
    db.tag("t", ROOT, range(48))
    (middle,) = [node for node, record in db.nodes() if record.start == 16]
    db.remove(middle)
    assert (db.pins(), db.tags(), db.usage()["pinned_bytes"]) == ([], [], 0)
    assert db.gc(0).num_evicted == 1


def test_a_pin_holds_again_what_was_damaged(db):
    """A span that is taken out alone, as damage is, and stored again."""
    put(db, range(48))
    db.pin(ROOT, range(48))
    for start in (0, 16, 32):
        (node,) = [node for node, record in db.nodes() if record.start == start]
        db.remove(node, only=True)
        assert db.verify() == []
        put(db, range(48))
        assert db.verify() == []
        db.gc(0)
        assert found(db, range(48)) == 48
    assert len(db.pins()) == 1
    (node,) = [node for node, record in db.nodes() if record.start == 16]
    db.remove(node, only=True)
    put(db, [*range(20), 1000])  # another span takes its place, which ends earlier
    put(db, range(48))
    db.gc(0)
    assert found(db, range(48)) == 48
