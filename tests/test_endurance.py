"""Kills, flipped bits and crowds, briefly; ``benchmarks/months.py`` goes on for longer."""

import endurance
import pytest

from promptdb import PromptDB


def test_kills(tmp_path):
    report = endurance.kills(tmp_path / "store", 12, seed=1)
    assert report["operations_acknowledged"] > 50
    assert report["spans_evicted"] > 0


def test_kills_are_noticed_if_they_lose_something(tmp_path, monkeypatch):
    """The check can fail: a store that lost its last operation is not taken for sound."""
    monkeypatch.setattr(endurance, "operation", lambda db, seed, number: None)
    with pytest.raises(AssertionError, match="not what it should be"):
        endurance.kills(tmp_path / "store", 3, seed=1)


def test_flipped_bits(tmp_path):
    report = endurance.flips(tmp_path, 20, seed=2)
    assert set(report) >= {"branch", "leaf", "meta", "overflow"}
    assert sum(each["flips"] for each in report.values()) == 20
    assert all(each["crash not seen by check"] == 0 for each in report.values())
    assert sum(each.get("some damaged", 0) for each in report.values()) > 2


def test_content_of_another_prompt_is_noticed():
    with PromptDB.in_memory(chunk_tokens=endurance.CHUNK) as db:
        endurance.put(db, range(100))
        assert endurance.check_content(db, range(100)) == 100
        with pytest.raises(AssertionError, match="another prompt's tensor"):
            endurance.check_content(db, range(100), largest=9000)


def test_a_crowd(tmp_path):
    report = endurance.crowds(tmp_path / "store", 3, 60)
    assert report["operations"] == 3 * 80
    assert report["prefixes_checked"] > 10
