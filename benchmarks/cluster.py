"""Clients of a real Redis Cluster on loopback, on what the shared tier asks of one: promptdb's, and two as they come.

``python benchmarks/cluster.py``. Needs redis-server, redis and hiredis (extra ``redis``), pytest (for the cluster's
starter, which is the tests'), and ``pip install valkey-glide-sync``, which promptdb itself does not use:
docs/decisions.md says why. Clients and the six servers share the machine's cores, so that ratios say more than absolute
times. Rounds of the clients alternate.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import median, percentile, report, timed

from promptdb.redis_connections import RedisConnections
from promptdb.shared_options import SharedOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from far_servers import redis_cluster

MIB = 1 << 20
ENTRY = 1100  # bytes of an index entry of 256 tokens
HEAD = 28  # of a value's manifest
NUM_KEYS = 1000
NUM_VALUES = 16
THREADS = 4


class RedisPy:
    """As it comes, with hiredis."""

    name = "redis-py"

    def __init__(self, port: int) -> None:
        from redis.backoff import NoBackoff
        from redis.cluster import RedisCluster
        from redis.retry import Retry

        options = {"socket_timeout": 10, "socket_connect_timeout": 10, "retry": Retry(NoBackoff(), 0), "protocol": 2}
        self._client = RedisCluster.from_url(f"redis://127.0.0.1:{port}", require_full_coverage=False, **options)

    def batch(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return pipeline.execute()

    def get(self, key: str, size: int) -> Any:
        return self._client.get(key)

    def set(self, key: str, value: bytes) -> None:
        self._client.set(key, value)


class Promptdb:
    """redis-py's connections to the nodes, each given its share of a batch; large values sent from where they are."""

    name = "promptdb"

    def __init__(self, port: int) -> None:
        url = f"redis+cluster://127.0.0.1:{port}"
        self._connections = RedisConnections(url, SharedOptions(url, timeout_s=10))

    def batch(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        return self._connections.run("lookups", commands)

    def get(self, key: str, size: int) -> Any:
        return self._connections.run("data", [("GET", key)])[0]

    def set(self, key: str, value: bytes) -> None:
        self._connections.run("data", [("SET", key, value)])


class Glide:
    """With one client, whose connections all threads share, as it is meant to be used."""

    name = "valkey-glide-sync"

    def __init__(self, port: int) -> None:
        from glide_sync import ClusterBatch, GlideClusterClient, GlideClusterClientConfiguration, NodeAddress

        self._batch = ClusterBatch
        configuration = GlideClusterClientConfiguration([NodeAddress("127.0.0.1", port)], request_timeout=10_000)
        self._client = GlideClusterClient.create(configuration)

    def batch(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        batch = self._batch(is_atomic=False)
        for command in commands:
            batch.custom_command([part if isinstance(part, bytes) else str(part) for part in command])
        return self._client.exec(batch, raise_on_error=True)

    def get(self, key: str, size: int) -> Any:
        return self._client.get(key)

    def set(self, key: str, value: bytes) -> None:
        self._client.set(key, value)


class GlideIntoBuffers(Glide):
    """Values are received into memory of the caller."""

    name = "valkey-glide-sync, into buffers"

    def get(self, key: str, size: int) -> Any:
        buffer = bytearray(size)
        self._client.get(key, buffer=memoryview(buffer))
        return buffer


def works(client: Any, values: list[bytes]) -> dict[str, Callable[[], Any]]:
    """Return what is measured: what the tier does for a lookup, and for the values that it found."""
    keys = [f"bench:i/{number:04x}" for number in range(NUM_KEYS)]
    large = [f"bench:v/{number:02x}#0" for number in range(NUM_VALUES)]

    def get_all() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda key: client.get(key, len(values[0])), large))

    def put_all() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(client.set, large, values))

    return {
        f"heads of {NUM_KEYS:,} values": lambda: client.batch([("GETRANGE", key, 0, HEAD - 1) for key in keys]),
        f"get {NUM_KEYS:,} entries of 1.1 kB": lambda: client.batch([("GET", key) for key in keys]),
        "put 64 entries of 1.1 kB": lambda: client.batch([("SET", key, b"e" * ENTRY, "NX") for key in keys[:64]]),
        "heads of 32 values": lambda: client.batch([("GETRANGE", key, 0, HEAD - 1) for key in keys[:32]]),
        "head of one value": lambda: client.batch([("GETRANGE", keys[0], 0, HEAD - 1)]),
        "put 4 MiB": lambda: client.set(large[0], values[0]),
        "get 4 MiB": lambda: client.get(large[0], len(values[0])),
        f"put {NUM_VALUES} x 4 MiB, {THREADS} threads": put_all,
        f"get {NUM_VALUES} x 4 MiB, {THREADS} threads": get_all,
    }


def measure(port: int, rounds: int = 5) -> list[dict]:
    values = [os.urandom(4 * MIB) for _ in range(NUM_VALUES)]
    clients = [Promptdb(port), RedisPy(port), Glide(port), GlideIntoBuffers(port)]
    first = works(clients[0], values)
    entries = [("SET", f"bench:i/{number:04x}", b"e" * ENTRY) for number in range(NUM_KEYS)]
    clients[0].batch(entries)
    first[f"put {NUM_VALUES} x 4 MiB, {THREADS} threads"]()
    for client in clients:
        assert bytes(client.get("bench:v/03#0", 4 * MIB)) == values[3]
        assert client.batch([("GET", key) for _, key, _ in entries]) == [b"e" * ENTRY] * NUM_KEYS
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for client in clients:
            for what, work in works(client, values).items():
                samples.setdefault((what, client.name), []).extend(timed(work, repeat=3))
    rows = []
    for what in first:
        row: dict = {"what": what}
        for client in clients:
            row[f"{client.name} ms"] = 1000 * median(samples[what, client.name])
        row["promptdb p95 ms"] = 1000 * percentile(samples[what, "promptdb"], 95)
        row["glide p95 ms"] = 1000 * percentile(samples[what, "valkey-glide-sync"], 95)
        row["redis-py / promptdb"] = row["redis-py ms"] / row["promptdb ms"]
        row["glide / promptdb"] = row["valkey-glide-sync ms"] / row["promptdb ms"]
        rows.append(row)
    return rows


def main() -> None:
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("redis", "hiredis", "valkey-glide-sync")}
    with tempfile.TemporaryDirectory(prefix="promptdb-cluster-") as directory, redis_cluster(Path(directory)) as nodes:
        report("cluster", measure(nodes[0].port), clients=versions)


if __name__ == "__main__":
    main()
