"""Recorded activations of a store: reading, storing, listing. A part of :class:`promptdb.PromptDB`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from promptdb.activations import Series, Shard, read_entry
from promptdb.commits import check_packed
from promptdb.errors import InputTypeError, NotRecordedError
from promptdb.format import ACTIVATIONS, CHECKSUM_BYTES, NODES, ROOTS, NodeRecord, unpack_root
from promptdb.hook_points import POINTS, canonical_name
from promptdb.keys import DIGEST_BYTES, Root, num_tokens
from promptdb.ledger import with_ledger
from promptdb.norms import Norms, norms_of
from promptdb.recordings import RecordedRows, RecordReport, put_recordings
from promptdb.rows import checked_point, only_series, positions_of, rows_of
from promptdb.tokens import Encoder, as_prompt

if TYPE_CHECKING:
    import torch

    from promptdb.dataset import ActivationDataset
    from promptdb.registry import Registry
    from promptdb.snapshot import Snapshot
    from promptdb.tables import Index, Reader


@dataclass
class Recorded:
    """What is recorded of one point and layer for one identity. ``series.dtype`` is that of the stored rows.

    ``row_shape`` is ``(heads, -1)`` of rows that are as long as the text before them.
    """

    root: Root
    series: Series
    num_spans: int = 0
    num_rows: int = 0
    size_bytes: int = 0
    row_shape: tuple[int, ...] = ()


class Recall:
    """Recorded activations. A base of :class:`promptdb.PromptDB`; see docs/activations.md. Thread safe."""

    _index: Index
    _clock: Callable[[], float]
    registry: Registry

    if TYPE_CHECKING:

        def _snapshot(self, reader: Reader) -> Snapshot: ...

    def activations(
        self,
        prompt: Any,
        point: str,
        layer: int | None = None,
        *,
        positions: int | slice | Iterable[int] | None = None,
        dtype: str | None = None,
        model: str | None = None,
        tokenizer: str | None = None,
        namespace: str = "",
        intervention: str = "",
    ) -> torch.Tensor:
        """Return what was recorded at a point, one row for each token of a prompt. Needs no model; never computes.

        Parameters
        ----------
        prompt : text, pieces of text, n token IDs, or packed tokens.
        point : as in :class:`~promptdb.hook_points.HookVariableNames`, or a module's path.
        layer : for points that each layer has.
        positions : of which tokens: an integer, a slice, or several integers; by default all n.
        dtype : ``"F32"``, ``"F16"``, ``"BF16"`` or ``"F64"``, where the same was recorded in several.
        model, tokenizer : weights ID and tokenizer ID, hex; may be left out where the store knows only one of them in
            the namespace.
        namespace, intervention : the rest of the root. Of an intervention that is not causal,
            :meth:`Intervention.id_for` of the prompt.

        Returns
        -------
        torch.Tensor
            ``[n, d]`` on the CPU; ``[n, heads, head_dim]`` for states inside of attention. Scores and probabilities are
            ``[n, heads, N]``, N the tokens of the whole prompt: a token's row ends at the token itself, and is followed
            by zeros (probabilities) or ``-inf`` (scores).

        Raises
        ------
        NotRecordedError
            Not all of these rows are stored.
        InputTypeError
            A prompt, point, layer or positions that cannot be; or several models or dtypes to choose from.
        CorruptDataError
            An entry does not hold.

        Notes
        -----
        One copy, from the memory map into pooled memory; of several MiB, with several threads. Imports torch.
        """
        root = self._root_for(model, tokenizer, namespace, intervention)
        packed = prompt if isinstance(prompt, bytes) else self._packed(prompt, root)
        check_packed(packed)
        name, layer = checked_point(point, layer)
        wanted = positions_of(positions, num_tokens(packed))
        with self._index.read() as reader:
            snapshot = self._snapshot(reader)
            match = snapshot.match(root, packed)
            series = only_series(reader, match, name, layer, dtype)
            return rows_of(snapshot, match, [series], wanted)[0]

    def activations_of(
        self, root: Root, packed: bytes, wanted: Sequence[Series], positions: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Return several series of one prompt, from one look at the store; see :meth:`activations`.

        Parameters
        ----------
        root, packed : identity and packed tokens of the prompt.
        positions : rising; by default all.
        """
        with self._index.read() as reader:
            snapshot = self._snapshot(reader)
            match = snapshot.match(root, packed)
            return rows_of(snapshot, match, wanted, positions)

    def activation_norms(
        self,
        prompt: Any,
        point: str,
        layers: Iterable[int] | None = None,
        *,
        dtype: str | None = None,
        model: str | None = None,
        tokenizer: str | None = None,
        namespace: str = "",
        intervention: str = "",
    ) -> Norms:
        """Return the Euclidean norm of each recorded row of a prompt at a point, by layer; NaN where there is none.

        Parameters
        ----------
        layers : which; by default all that are recorded.
        prompt, point, dtype, model, tokenizer, namespace, intervention : as for :meth:`activations`.

        Raises
        ------
        NotRecordedError
            Nothing is recorded of the point, or of one of ``layers``, for this prompt.
        InputTypeError, CorruptDataError
            As :meth:`activations`.

        Notes
        -----
        Reads every row. Imports numpy, not torch.
        """
        name, named = canonical_name(point)
        if layers is None and named is not None:
            layers = [named]
        root = self._root_for(model, tokenizer, namespace, intervention)
        packed = prompt if isinstance(prompt, bytes) else self._packed(prompt, root)
        check_packed(packed)
        with self._index.read() as reader:
            snapshot = self._snapshot(reader)
            return norms_of(snapshot, snapshot.match(root, packed), name, layers, dtype)

    def _root_for(self, model: str | None, tokenizer: str | None, namespace: str, intervention: str) -> Root:
        if model is not None and tokenizer is not None:
            return Root(model, tokenizer, namespace, intervention)
        with self._index.read() as reader:
            roots = [unpack_root(key, value)[0] for key, value in reader.scan(ROOTS)]
        found = [
            root
            for root in roots
            if (root.namespace, root.intervention_id, root.kv_codec) == (namespace, intervention, "")
            and model in (None, root.weights_id)
            and tokenizer in (None, root.tokenizer_id)
        ]
        if len(found) != 1:
            known = (
                ", ".join(f"{root.weights_id[:8]} with tokenizer {root.tokenizer_id[:8]}" for root in found) or "none"
            )
            raise InputTypeError(
                f"the store holds {len(found)} models of that kind: {known}",
                "pass model= and tokenizer=, the whole IDs",
            )
        return found[0]

    def _packed(self, prompt: Any, root: Root) -> bytes:
        fields = self.registry.tokenizer(root.tokenizer_id)
        if isinstance(prompt, str) and fields is None:
            raise InputTypeError("the store does not know the model's tokenizer", "pass token IDs")
        encoder: Any = Encoder.from_registry(fields) if fields is not None else None
        return as_prompt(prompt, encoder).packed

    def activation_dataset(
        self,
        point: str,
        layer: int | None = None,
        *,
        batch_size: int = 1024,
        shuffle_buffer: int = 1 << 17,
        seed: int = 0,
        dtype: str | None = None,
        model: str | None = None,
        tokenizer: str | None = None,
        namespace: str = "",
        intervention: str = "",
    ) -> ActivationDataset:
        """Return all rows of a point as shuffled batches, a ``torch.utils.data.IterableDataset``.

        Parameters
        ----------
        point, layer, dtype, model, tokenizer, namespace, intervention : as for :meth:`activations`. Rows of two models
            are never mixed.
        batch_size, shuffle_buffer, seed : see :class:`~promptdb.dataset.ActivationDataset`.

        Raises
        ------
        NotRecordedError
            Nothing of it is stored.

        Notes
        -----
        Looks at every entry of the store once: some microseconds each. Imports torch.
        """
        from promptdb.dataset import ActivationDataset

        series, shards = self._shards(
            self._root_for(model, tokenizer, namespace, intervention), *checked_point(point, layer), dtype
        )
        return ActivationDataset(
            self,  # type: ignore[arg-type]
            series,
            shards,
            batch_size=batch_size,
            shuffle_buffer=shuffle_buffer,
            seed=seed,
        )

    def recorded_spans(
        self,
        point: str,
        layer: int | None = None,
        *,
        dtype: str | None = None,
        model: str | None = None,
        tokenizer: str | None = None,
        namespace: str = "",
        intervention: str = "",
    ) -> tuple[Root, Series, list[bytes]]:
        """Return identity and series of a point's rows, and the spans that have some; as :meth:`activation_dataset`."""
        root = self._root_for(model, tokenizer, namespace, intervention)
        series, shards = self._shards(root, *checked_point(point, layer), dtype)
        return root, series, [shard.node for shard in shards]

    def _shards(self, root: Root, name: str, layer: int | None, dtype: str | None) -> tuple[Series, list[Shard]]:
        """Return the only series of a point, and the spans that have rows of it."""
        if name in POINTS and POINTS[name].is_pairwise:
            raise InputTypeError(
                f"rows of {name} are as long as the text before them: they do not fit into one table",
                "read them prompt by prompt: db.activations(prompt, point, layer)",
            )
        found: dict[Series, list[Shard]] = {}
        suffix = Series.prefix(name, layer)
        with self._index.read() as reader:
            for key, value in reader.scan(ACTIVATIONS):
                if not key.startswith(suffix, DIGEST_BYTES):
                    continue
                series, node = Series.of_key(key), key[:DIGEST_BYTES]
                data = reader.get(NODES, node)
                if data is None or dtype not in (None, series.dtype):
                    continue
                record = NodeRecord.unpack(node, data)
                if record.root == root:
                    rows = read_entry(value[CHECKSUM_BYTES:]).num_rows
                    found.setdefault(series, []).append(Shard(node, record.num_tokens, rows))
        if len(found) > 1:
            raise InputTypeError(
                f"{name} was recorded as {', '.join(each.dtype for each in sorted(found))}",
                "choose one of them: dtype=, or --as",
            )
        if not found:
            where = name if layer is None else f"{name} of layer {layer}"
            raise NotRecordedError(f"nothing is recorded of {where}", "`promptdb activations ls` lists what is")
        return next(iter(found.items()))

    def put_activations(self, recordings: Sequence[RecordedRows]) -> RecordReport:
        """Store rows of stored spans, all together or not at all, durably. Rows that are there already stay.

        Raises
        ------
        QuotaExceededError, ReadOnlyStoreError, StoreFullError, StoreError
            Nothing is visible.

        Notes
        -----
        One transaction. What is of spans that are gone is left out: see :class:`~promptdb.recordings.RecordReport`.
        """
        return put_recordings(self._index, recordings, clock=self._clock)

    def remove_activations(self, point: str, layer: int | None = None, *, model: str | None = None) -> int:
        """Remove what was recorded at a point, of one layer or all; return how many spans' entries went.

        Parameters
        ----------
        model : weights ID; by default of all models.
        """
        removed = 0
        for node, series in list(self._entries()):
            if series.point == point and layer in (None, series.layer):
                removed += self.remove_entry(node, series, model=model)
        return removed

    def remove_entry(self, node: bytes, series: Series, *, model: str | None = None) -> bool:
        """Remove one entry of recorded activations; return whether it was there. The span stays."""

        def work(ledger: Any) -> bool:
            data = ledger.writer.get(NODES, node)
            if data is None:
                return False
            root = NodeRecord.unpack(node, data).root
            if model not in (None, root.weights_id):
                return False
            return bool(ledger.remove_activations(root, node, [series.key(node)]))

        return with_ledger(self._index, self._clock(), work)

    def recorded(self) -> list[Recorded]:
        """Return what is recorded, by identity, point and layer. Reads the head of every entry."""
        found: dict[tuple[bytes, Series], Recorded] = {}
        roots: dict[bytes, Root | None] = {}
        with self._index.read() as reader:
            for key, value in reader.scan(ACTIVATIONS):
                node = key[:DIGEST_BYTES]
                if node not in roots:
                    data = reader.get(NODES, node)
                    roots[node] = None if data is None else NodeRecord.unpack(node, data).root
                root = roots[node]
                if root is None:
                    continue
                series, entry = Series.of_key(key), read_entry(value[CHECKSUM_BYTES:])
                each = found.setdefault((root.digest, series), Recorded(root, series))
                each.num_spans += 1
                each.num_rows += entry.num_rows
                each.size_bytes += len(value)
                each.row_shape = entry.row_shape
        order = {name: at for at, name in enumerate(POINTS)}

        def place(each: Recorded) -> tuple[bytes, int, Series]:
            series = each.series._replace(layer=each.series.layer or 0)
            return each.root.digest, order.get(series.point, len(order)), series

        return sorted(found.values(), key=place)

    def _entries(self) -> list[tuple[bytes, Series]]:
        with self._index.read() as reader:
            return [(key[:DIGEST_BYTES], Series.of_key(key)) for key in reader.keys(ACTIVATIONS)]
