"""A contract suite for whoever writes a :class:`promptdb.far.FarStore`, and for promptdb itself. Needs pytest.

Used by subclassing, against a real server::

    class TestMyEngine(FarContract):
        def open_far(self, name):
            return MyEngine(f"myengine://127.0.0.1/{name}")

``pytest.register_assert_rewrite("promptdb.testing_shared")`` in a ``conftest.py`` makes failures tell what differs.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from blake3 import blake3

from promptdb.far import FarStore, joined

__all__ = ["FarContract"]

# Around the sizes at which engines cut values: nothing, inline values, parts of 4 MiB.
SIZES = (0, 1, 1000, (64 << 10) - 1, 64 << 10, (64 << 10) + 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, (9 << 20) + 7)


def value_of(size: int, seed: int = 0) -> bytes:
    """Return bytes in which no part equals another."""
    return bytes(blake3(seed.to_bytes(8, "little")).digest(length=size))


class FarContract:
    """What every far store must do. Subclass it, name the class ``Test...``, and say how one is opened."""

    @abstractmethod
    def open_far(self, name: str) -> FarStore:
        """Return a store that shares nothing with those of other names, and everything with those of its own."""

    @pytest.fixture
    def name(self) -> str:
        """Return a name that nobody has used."""
        return uuid.uuid4().hex[:12]

    @pytest.fixture
    def far(self, name: str) -> Iterator[FarStore]:
        """Yield an empty store."""
        far = self.open_far(name)
        yield far
        far.close()

    def test_missing(self, far: FarStore) -> None:
        """What was never put is a miss, and can be deleted."""
        assert (far.get([]), far.exists([]), far.put([])) == ([], [], [])
        assert far.get(["v/aa", "i/00/bb"]) == [None, None]
        assert far.exists(["v/aa", "i/00/bb"]) == [False, False]
        assert list(far.list("v/")) == []
        far.delete(["v/aa"])

    @pytest.mark.parametrize("size", SIZES)
    def test_values_of_any_size(self, far: FarStore, size: int) -> None:
        """A value comes back as it went, whatever is said of its size, and shows in another client."""
        value = value_of(size)
        assert far.put([("v/one", memoryview(value))]) == [True]
        for sizes in (None, [size], [0], [30 << 20]):
            (pieces,) = far.get(["v/one"], sizes)
            assert pieces is not None
            assert joined(pieces) == value
        assert far.exists(["v/one"]) == [True]

    def test_seen_by_others(self, far: FarStore, name: str) -> None:
        """Another client of the same name sees it at once; one of another name never."""
        far.put([("v/one", b"value")])
        same, other = self.open_far(name), self.open_far(name + "x")
        try:
            assert [None if each is None else joined(each) for each in same.get(["v/one"])] == [b"value"]
            assert other.get(["v/one"]) == [None]
            assert list(other.list("v/")) == []
        finally:
            same.close()
            other.close()

    def test_values_are_never_changed(self, far: FarStore) -> None:
        """The first one wins, in a batch too."""
        assert far.put([("v/one", b"first")]) == [True]
        assert far.put([("v/one", value_of(5 << 20)), ("v/two", b"second")]) == [False, True]
        assert [joined(each) for each in far.get(["v/one", "v/two"]) if each is not None] == [b"first", b"second"]
        far.delete(["v/one"])
        assert far.put([("v/one", b"again")]) == [True]

    def test_batches_keep_their_order(self, far: FarStore) -> None:
        """Answers stand in the order of the questions, with repetitions."""
        keys = [f"i/{number % 7:02x}/{number:04x}" for number in range(100)]
        assert far.put([(key, key.encode()) for key in keys]) == [True] * 100
        asked = [*reversed(keys), "i/00/none", keys[3], keys[3]]
        found = far.get(asked)
        assert [None if each is None else joined(each) for each in found] == [
            key.encode() if key != "i/00/none" else None for key in asked
        ]
        assert far.exists(asked) == [key != "i/00/none" for key in asked]

    def test_delete(self, far: FarStore) -> None:
        """What is deleted is gone, parts and all; the rest stays."""
        far.put([("v/large", value_of(9 << 20)), ("v/small", b"s"), ("v/kept", b"k")])
        far.delete(["v/large", "v/small", "v/never"])
        assert far.exists(["v/large", "v/small", "v/kept"]) == [False, False, True]
        assert list(far.list("v/")) == ["v/kept"]

    def test_list(self, far: FarStore) -> None:
        """Keys under a prefix, each once, and nothing of how they are kept."""
        keys = {f"i/{root}/{number:03x}" for root, number in itertools.product(("aa", "ab"), range(30))}
        far.put([(key, b"x") for key in sorted(keys)])
        far.put([("v/large", value_of(9 << 20)), ("r/one", b"r")])
        assert sorted(far.list("i/")) == sorted(keys)
        assert sorted(far.list("i/aa/")) == sorted(key for key in keys if key.startswith("i/aa/"))
        assert list(far.list("v/")) == ["v/large"]
        assert list(far.list("l/")) == []

    def test_racing_writers(self, far: FarStore) -> None:
        """Of many who put the same at once, one creates it; a reader sees nothing, or all of it."""
        value = value_of(6 << 20)
        stop = threading.Event()
        wrong: list[int] = []

        def watch() -> None:
            while not stop.is_set():
                (pieces,) = far.get(["v/raced"], [len(value)])
                if pieces is not None and joined(pieces) != value:
                    wrong.append(1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(4) as pool:
            created = list(pool.map(lambda _: far.put([("v/raced", value)])[0], range(4)))
        stop.set()
        watcher.join(30)
        assert sum(created) == 1
        assert wrong == []
        (pieces,) = far.get(["v/raced"])
        assert pieces is not None
        assert joined(pieces) == value

    def test_many_readers(self, far: FarStore) -> None:
        """Threads do not get each other's answers."""
        values = {f"v/{number:02x}": value_of(100_000, number) for number in range(8)}
        far.put(list(values.items()))

        def read(key: str) -> bool:
            (pieces,) = far.get([key], [100_000])
            return pieces is not None and joined(pieces) == values[key]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, list(values) * 5))

    def test_leases(self, far: FarStore, name: str) -> None:
        """One holder has a key, until it gives it back or the time is over; others hear for how long."""
        other = self.open_far(name)
        try:
            assert far.lease([], "one", 5) == []
            assert far.lease(["c/aa", "c/bb"], "one", 5) == [0, 0]
            assert far.lease(["c/aa"], "one", 5) == [0]
            left_s = other.lease(["c/cc", "c/bb"], "two", 5)
            if not far.has_leases:
                assert left_s == [0, 0]
                return
            assert left_s[0] == 0
            assert 3 < left_s[1] <= 5
            assert (far.get(["c/aa"]), far.exists(["c/aa"]), list(far.list("i/"))) == ([None], [False], [])
            other.release(["c/aa", "c/none"], "two")
            assert other.lease(["c/aa"], "two", 5)[0] > 0
            far.release(["c/aa", "c/cc"], "one")
            assert other.lease(["c/aa", "c/bb", "c/cc"], "two", 0.1)[0] == 0
            assert far.lease(["c/aa"], "one", 5)[0] <= 0.1
            time.sleep(0.15)
            assert far.lease(["c/aa"], "one", 5) == [0]
        finally:
            other.close()

    def test_facts_and_closing(self, far: FarStore) -> None:
        """It can be asked what it is, and closed twice."""
        assert all(isinstance(value, (str, int)) for value in far.facts().values())
        far.close()
        far.close()
