"""The contract of tables: on LMDB and in memory, and encrypted in both."""

from pathlib import Path

from promptdb.index import LmdbIndex
from promptdb.memory import MemoryIndex
from promptdb.sealed import SealedIndex
from promptdb.sealing import Sealer
from promptdb.tables import Index
from promptdb.testing import IndexContract


class TestLmdbIndex(IndexContract):
    def open_index(self, directory: Path) -> Index:
        return LmdbIndex(directory, map_bytes=1)  # so small that the map grows in every test


class TestMemoryIndex(IndexContract):
    persistent = False

    def open_index(self, directory: Path) -> Index:
        return MemoryIndex()


class TestSealedLmdbIndex(IndexContract):
    def open_index(self, directory: Path) -> Index:
        return SealedIndex(LmdbIndex(directory, map_bytes=1), Sealer(bytes(range(32))))


class TestSealedMemoryIndex(IndexContract):
    persistent = False

    def open_index(self, directory: Path) -> Index:
        return SealedIndex(MemoryIndex(), Sealer(bytes(32)))
