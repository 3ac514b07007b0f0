"""What can be told of a shared store: how fast it is, and what it was good for."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import asdict
from time import perf_counter
from typing import Any

from promptdb.errors import SharedError
from promptdb.far import FarStore
from promptdb.shared_counts import SharedTotals

from .output import age, count, duration, size

_PROBE_BYTES = 4 << 20
_PROBES = 5


def describe_totals(totals: SharedTotals) -> dict[str, Any]:
    """Return what all processes had of the shared store, for programs."""
    failure = {"last_failure": totals.last_failure, "last_failure_unix_s": totals.last_failure_unix_s}
    return {**asdict(totals.counts), "hit_rate": totals.counts.hit_rate, "failures": totals.failures, **failure}


def totals_fields(found: dict[str, Any]) -> dict[str, str]:
    """Return the same for people; empty where there is nothing to say."""
    fields = {}
    if found["lookups"]:
        fields["hits"] = f"{found['hit_rate']:.0%} of {count(found['lookups'], 'lookup')}"
    if found["tokens_fetched"]:
        fields["fetched"] = f"{count(found['tokens_fetched'], 'token')}, {size(found['bytes_fetched'])}"
    if found["spans_sent"]:
        fields["sent"] = f"{count(found['spans_sent'], 'span')}, {size(found['bytes_sent'])}"
    if found["waits"]:
        fields["waited"] = f"{count(found['waits'], 'time')} for others, {duration(found['waited_s'])}"
    bad = {"rejected": "did not hold", "lost": "were gone", "too_large": "were too large"}
    told = [f"{found[name]:,} {what}" for name, what in bad.items() if found[name]]
    if told:
        fields["values"] = ", ".join(told)
    if found["failures"]:
        fields["failures"] = (
            f"{found['failures']:,}, the last {age(found['last_failure_unix_s'])} ago: {found['last_failure']}"
        )
    return fields


def measured(far: FarStore, *, write: bool) -> dict[str, Any]:
    """Return what a far store says of itself, and how fast it is."""
    found: dict[str, Any] = {**far.facts()}
    key = f"x/{secrets.token_hex(8)}"
    trips = []
    for _ in range(_PROBES):
        began = perf_counter()
        far.get([key])
        trips.append(perf_counter() - began)
    found["round_trip_s"] = sorted(trips)[_PROBES // 2]
    if write:
        value = os.urandom(_PROBE_BYTES)
        try:
            began = perf_counter()
            far.put([(key, value)])
            found["send_bytes_per_s"] = _PROBE_BYTES / (perf_counter() - began)
            began = perf_counter()
            far.get([key], [_PROBE_BYTES])
            found["fetch_bytes_per_s"] = _PROBE_BYTES / (perf_counter() - began)
        finally:
            with suppress(SharedError):
                far.delete([key])
    return found


def status_fields(found: dict[str, Any]) -> dict[str, str]:
    """Return what a person reads of the shared store."""
    fields = {"shared store": found["url"]}
    if not found["reachable"]:
        fields |= {"answers": f"no: {found['reason']}", "hint": found["hint"]}
    else:
        fields |= {"answers": f"in {duration(found['round_trip_s'])}"}
        if "send_bytes_per_s" in found:
            fields["speed"] = f"{size(found['send_bytes_per_s'])}/s there, {size(found['fetch_bytes_per_s'])}/s back"
        shown = {"server": "server", "policy": "evicts by", "nodes": "primaries", "encrypted": "encrypted"}
        fields |= {title: str(found[name]) for name, title in shown.items() if name in found}
        if "used_bytes" in found:
            limit = found["maxmemory_bytes"]
            fields["memory"] = f"{size(found['used_bytes'])} of {size(limit) if limit else 'no limit'}"
    waiting = found["waiting"]
    return {**fields, **totals_fields(found), "waiting": f"{waiting:,} to be sent" if waiting else "nothing"}
