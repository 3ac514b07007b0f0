"""What a store knows about models, tokenizers and checkpoints, so that a lookup needs neither torch nor weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from promptdb.format import CHECKPOINTS, MODELS, TOKENIZERS, pack_record, unpack_record
from promptdb.tables import Index, Writer

# A rate measured now counts this much against the ones before.
_RATE_WEIGHT = 0.3


class Registry:
    """Models, tokenizers and checkpoints of one store. Thread safe, as the index is.

    ``models``
        weights ID -> description (architecture, sizes, dtype) and measured rates.
    ``tokenizers``
        tokenizer ID -> the tokenizer's effective JSON.
    ``checkpoints``
        digest of a checkpoint's file identity and load options -> IDs, so that an unchanged checkpoint is not hashed
        again.
    """

    def __init__(self, index: Index) -> None:
        self._index = index

    def _get(self, table: str, key: bytes) -> dict[str, Any] | None:
        with self._index.read() as reader:
            data = reader.get(table, key)
            return None if data is None else unpack_record(key, data)

    def _all(self, table: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
        with self._index.read() as reader:
            yield from [(key, unpack_record(key, value)) for key, value in reader.scan(table)]

    def _put(self, table: str, key: bytes, fields: Mapping[str, Any], *, replace: bool = False) -> None:
        packed = pack_record(key, fields)

        def work(writer: Writer) -> None:
            if replace or writer.get(table, key) is None:  # another process may have been first
                writer.put(table, key, packed)

        self._index.transact(work)

    def model(self, weights_id: str) -> dict[str, Any] | None:
        """Return what is known of a model, or None."""
        return self._get(MODELS, bytes.fromhex(weights_id))

    def models(self) -> dict[str, dict[str, Any]]:
        """Return all known models by weights ID."""
        return {key.hex(): fields for key, fields in self._all(MODELS)}

    def add_model(self, weights_id: str, description: Mapping[str, Any]) -> None:
        """Enter a model, or what has changed of its description. Rates and the date of the first time stay."""
        known = self.model(weights_id)
        merged = {**(known or {}), **description}
        merged.setdefault("first_seen_unix_s", time.time())
        if merged != known:
            self._put(MODELS, bytes.fromhex(weights_id), merged)

    def update_rates(self, weights_id: str, **rates: float) -> None:
        """Fold rates (``compute_tokens_per_s``, ``load_bytes_per_s``, ``kv_bytes_per_token``) into a model's."""
        key = bytes.fromhex(weights_id)

        def work(writer: Writer) -> None:
            data = writer.get(MODELS, key)
            if data is None:
                return
            fields = unpack_record(key, data)
            for name, rate in rates.items():
                before = fields.get(name)
                fields[name] = rate if before is None else (1 - _RATE_WEIGHT) * before + _RATE_WEIGHT * rate
            writer.put(MODELS, key, pack_record(key, fields))

        self._index.transact(work)

    def tokenizer(self, tokenizer_id: str) -> dict[str, Any] | None:
        """Return a tokenizer's entry (``json``, ``name``, ``verbatim``), or None."""
        return self._get(TOKENIZERS, bytes.fromhex(tokenizer_id))

    def tokenizers(self) -> dict[str, dict[str, Any]]:
        """Return all known tokenizers by ID."""
        return {key.hex(): fields for key, fields in self._all(TOKENIZERS)}

    def add_tokenizer(self, tokenizer_id: str, fields: Mapping[str, Any]) -> None:
        """Enter a tokenizer unless it is known already."""
        with self._index.read() as reader:
            known = reader.size(TOKENIZERS, bytes.fromhex(tokenizer_id)) is not None
        if not known:
            self._put(TOKENIZERS, bytes.fromhex(tokenizer_id), fields)

    def checkpoint(self, file_key: bytes) -> dict[str, Any] | None:
        """Return the IDs of a checkpoint whose files and load options have this digest, or None."""
        return self._get(CHECKPOINTS, file_key)

    def checkpoints(self) -> list[dict[str, Any]]:
        """Return the entries of all checkpoints: ``path``, ``weights_id``, ``tokenizer_id``."""
        return [fields for _, fields in self._all(CHECKPOINTS)]

    def add_checkpoint(self, file_key: bytes, fields: Mapping[str, Any]) -> None:
        """Remember the IDs of a checkpoint."""
        if self.checkpoint(file_key) != dict(fields):
            self._put(CHECKPOINTS, file_key, fields, replace=True)
