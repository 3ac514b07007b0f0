"""What a store holds and has been good for, for Prometheus. Needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Iterator

from promptdb.db import PromptDB
from promptdb.errors import StoreError
from promptdb.outbox import waiting
from promptdb.shared_counts import read_shared_counts

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise StoreError("metrics need prometheus-client", "pip install 'promptdb[metrics]'") from error

# Fields of PromptDB.stat(): name of the metric, what it says.
_GAUGES = {
    "num_nodes": ("spans", "Stored spans."),
    "num_tokens": ("tokens", "Tokens of stored spans."),
    "num_logits": ("logits", "Positions after which logits are stored."),
    "num_roots": ("roots", "Identities (weights, tokenizer, namespace, intervention) with spans."),
    "num_orphans": ("orphans", "Spans that stand on removed ones."),
    "blob_bytes": ("blob_bytes", "Bytes of blobs and logits."),
    "charged_bytes": ("charged_bytes", "Bytes that count for the quota."),
    "pinned_bytes": ("pinned_bytes", "Of these, bytes that are pinned."),
    "quota_bytes": ("quota_bytes", "The quota; 0 for none."),
    "file_bytes": ("file_bytes", "Size of the data file."),
    "used_bytes": ("used_bytes", "Bytes of the data file up to the last page in use."),
    "map_bytes": ("map_bytes", "Size of the memory map."),
    "free_bytes": ("disk_free_bytes", "Free bytes of the disk."),
    "num_readers": ("readers", "Snapshots that are held, in all processes."),
}
_MOST_WAITING = 1 << 20
_COUNTERS = {
    "num_evicted": ("evicted_spans", "Spans evicted since the store was created."),
    "evicted_bytes": ("evicted_bytes", "Bytes of evicted spans."),
    "num_expired": ("expired_spans", "Expired spans that were removed."),
    "expired_bytes": ("expired_bytes", "Bytes of expired spans that were removed."),
}
_SERVED = {
    "num_prompts": ("prompts", "Prompts that engines were asked for."),
    "num_complete": ("complete_prompts", "Of these, prompts of which nothing had to be computed."),
    "tokens_loaded": ("loaded_tokens", "Tokens that were found."),
    "tokens_computed": ("computed_tokens", "Tokens that were computed."),
    "load_s": ("load_seconds", "Seconds spent on finding and loading."),
    "compute_s": ("compute_seconds", "Seconds spent on computing."),
    "num_quarantined": ("quarantined", "Damaged spans and logits that were taken out."),
}
_SHARED = {
    "lookups": ("shared_lookups", "Prompts looked up in the shared store."),
    "hits": ("shared_hits", "Of these, prompts of which it had more than this store."),
    "round_trips": ("shared_round_trips", "Round trips of these lookups."),
    "tokens_fetched": ("shared_fetched_tokens", "Tokens that came from the shared store."),
    "bytes_fetched": ("shared_fetched_bytes", "Bytes that came from the shared store."),
    "spans_sent": ("shared_sent_spans", "Spans sent to the shared store."),
    "bytes_sent": ("shared_sent_bytes", "Bytes sent to the shared store."),
    "rejected": ("shared_rejected", "What came from there and did not hold, or was not signed by anybody trusted."),
    "lost": ("shared_lost", "Values that were gone, wholly or in part."),
    "skipped": ("shared_skipped", "Lookups and fetches not made, as computing is faster."),
    "too_large": ("shared_too_large", "Spans that the shared store should not hold."),
    "waits": ("shared_waits", "Times that another machine was waited for, which computed the same."),
    "waited_s": ("shared_waited_seconds", "Seconds of these."),
}


class StoreCollector(Collector):
    """Collects the metrics of an open store, when it is asked to.

    Examples
    --------
    >>> from prometheus_client import CollectorRegistry
    >>> registry = CollectorRegistry()
    >>> with PromptDB.in_memory() as db:
    ...     registry.register(StoreCollector(db))
    ...     registry.get_sample_value("promptdb_spans")
    0.0
    """

    def __init__(self, db: PromptDB) -> None:
        self._db = db

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics. Cheap: no span is read."""
        stat = self._db.stat()
        for field, (name, what) in _GAUGES.items():
            if field in stat:
                yield GaugeMetricFamily(f"promptdb_{name}", what, value=stat[field])
        for field, (name, what) in _COUNTERS.items():
            if field in stat:
                yield CounterMetricFamily(f"promptdb_{name}", what, value=stat[field])
        with self._db.read() as snapshot:
            shared = read_shared_counts(snapshot.reader) if self._db.tier is None else self._db.tier.totals()
            num_waiting = len(waiting(snapshot.reader, _MOST_WAITING))
        for field, (name, what) in _SHARED.items():
            yield CounterMetricFamily(f"promptdb_{name}", what, value=getattr(shared.counts, field))
        yield CounterMetricFamily("promptdb_shared_failures", "Failures of the shared store.", value=shared.failures)
        yield GaugeMetricFamily(
            "promptdb_shared_waiting", "Spans that wait to be sent to the shared store.", value=num_waiting
        )
        served = self._db.served()
        for field, (name, what) in _SERVED.items():
            family = CounterMetricFamily(f"promptdb_{name}", what, labels=["weights_id", "model"])
            for weights_id, counts in sorted(served.items()):
                model = str((self._db.registry.model(weights_id) or {}).get("name", ""))
                family.add_metric([weights_id, model], getattr(counts, field))
            yield family


def exposition(db: PromptDB) -> str:
    """Return the metrics of a store as Prometheus reads them (text format 0.0.4)."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(db))
    return generate_latest(registry).decode()
