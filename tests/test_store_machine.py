"""Stores under random puts, lookups, removals and reopenings, against a list of prompts."""

from pathlib import Path

from hypothesis import HealthCheck, settings

from promptdb.db import PromptDB
from promptdb.testing import StoreMachine


class MemoryMachine(StoreMachine):
    persistent = False

    def open_store(self, directory: Path, chunk_tokens: int | None) -> PromptDB:
        return PromptDB.in_memory(chunk_tokens=chunk_tokens)


class LmdbMachine(StoreMachine):
    def open_store(self, directory: Path, chunk_tokens: int | None) -> PromptDB:
        return PromptDB(directory / "store", chunk_tokens=chunk_tokens, map_bytes=1, verify_reads="always")


class CodedMachine(StoreMachine):
    """Compressed and encrypted."""

    def open_store(self, directory: Path, chunk_tokens: int | None) -> PromptDB:
        options = {"compression": "zstd", "key": bytes(range(32))}
        return PromptDB(directory / "store", chunk_tokens=chunk_tokens, map_bytes=1, verify_reads="always", **options)


slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
TestMemoryStore = MemoryMachine.TestCase
TestMemoryStore.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=slow)
TestLmdbStore = LmdbMachine.TestCase
TestLmdbStore.settings = settings(max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=slow)
TestCodedStore = CodedMachine.TestCase
TestCodedStore.settings = settings(max_examples=4, stateful_step_count=20, deadline=None, suppress_health_check=slow)
