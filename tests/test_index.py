"""The contract of tables, on LMDB and in memory."""

from pathlib import Path

from promptdb.index import LmdbIndex
from promptdb.memory import MemoryIndex
from promptdb.tables import Index
from promptdb.testing import IndexContract


class TestLmdbIndex(IndexContract):
    def open_index(self, directory: Path) -> Index:
        return LmdbIndex(directory, map_bytes=1)  # so small that the map grows in every test


class TestMemoryIndex(IndexContract):
    persistent = False

    def open_index(self, directory: Path) -> Index:
        return MemoryIndex()
