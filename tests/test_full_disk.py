"""A disk that is full: what is used least goes, or the put fails alone."""

import logging
import shutil
import subprocess

import pytest
from limits_tools import ROOT, a_clock, charged, dated_db, found, put  # noqa: F401 - fixtures

from promptdb import PromptDB
from promptdb.errors import (
    StoreFullError,
)


@pytest.fixture
def small_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
@pytest.mark.parametrize("size", [3000, 60_000, 500_000])
def test_a_full_disk_evicts_and_tries_again(small_disk, clock, caplog, size):
    with PromptDB(small_disk / "store", clock=clock) as db, caplog.at_level(logging.WARNING, "promptdb"):
        for first in range(24_000_000 // size):
            clock.now += 1
            put(db, [first], size=size)
            assert found(db, [first]) == 1
        assert db.verify() == []
        assert db.usage()["num_evicted"] > 12_000_000 // size
        assert charged(db) > 2_000_000
        assert "trying again" in caplog.text
        with pytest.raises(StoreFullError, match=r"no space left|cannot grow"):
            put(db, [-1 % 2**32], size=9_000_000)
        assert db.verify() == []
        put(db, [7, 7], size=size)
        assert found(db, [7, 7]) == 2


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
def test_a_full_disk_with_everything_pinned(small_disk, clock):
    with PromptDB(small_disk / "store", clock=clock) as db:

        def fill():
            for first in range(1000):
                put(db, [first], size=60_000)
                db.pin(ROOT, [first])

        with pytest.raises(StoreFullError, match="no space left"):
            fill()
        assert len(db.pins()) > 20
        assert all(found(db, [first]) for first in range(len(db.pins())))
        db.remove(db.pins()[0].node)
        assert db.verify() == []
