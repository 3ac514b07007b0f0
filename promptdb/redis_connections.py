"""Connections to Redis and Valkey, standalone or Cluster, and batches of commands. The only importer of redis.

A Cluster's batch is split by node here, sent to all nodes and then read from all: the pipeline of redis-py's Cluster
client works out each command's kind and place anew, and takes four times as long (``benchmarks/cluster.py``). It is
asked for what was moved meanwhile: it knows how to follow.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from promptdb.errors import SharedError
from promptdb.shared_options import PASSWORD_VARIABLE, SharedOptions, without_secrets

_LOOKUP_CONNECTIONS = 2
_READ_BYTES = 256 << 10

Command = tuple[Any, ...]


class RedisConnections:
    """Connections to one server or Cluster, made when they are used first. May be used by many threads.

    Parameters
    ----------
    url : see :class:`promptdb.far_redis.FarRedis`.

    Raises
    ------
    SharedError
        redis-py is not installed.
    """

    def __init__(self, url: str, options: SharedOptions) -> None:
        _redis()
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self.prefix = query.pop("prefix", "promptdb") + ":"
        self.is_cluster = parts.scheme.endswith("+cluster")
        self.name = without_secrets(url)
        scheme = parts.scheme.removesuffix("+cluster")
        self._url = urlunsplit((scheme, parts.netloc, parts.path, urlencode(query), ""))
        self._options = options
        self._lock = threading.Lock()
        self._clients: dict[str, Any] = {}

    def client(self, use: str) -> Any:
        """Return redis-py's client for ``"lookups"`` or ``"data"``: a small reply must not wait behind a large one."""
        with self._lock:
            if use not in self._clients:
                self._clients[use] = self._connect(use)
            return self._clients[use]

    def run(self, use: str, commands: Sequence[Command]) -> list[Any]:
        """Send commands, each with its key second, at once; return their replies, unparsed. Raises the first error."""
        if not commands:
            return []
        client = self.client(use)
        if not self.is_cluster:
            replies = _exchange([(client.connection_pool, commands)])[0]
        else:
            replies = self._run_on_nodes(client, commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _run_on_nodes(self, client: Any, commands: Sequence[Command]) -> list[Any]:
        groups: dict[Any, list[int]] = {}  # which commands go to a node
        for at, (_, key, *_) in enumerate(commands):
            groups.setdefault(client.get_node_from_key(key), []).append(at)
        pools = [client.get_redis_connection(node).connection_pool for node in groups]
        batches = [[commands[at] for at in group] for group in groups.values()]
        replies: list[Any] = [None] * len(commands)
        for group, answers in zip(groups.values(), _exchange(list(zip(pools, batches, strict=True))), strict=True):
            for at, answer in zip(group, answers, strict=True):
                replies[at] = answer
        redirections = _redirections()
        moved = [at for at, reply in enumerate(replies) if isinstance(reply, redirections)]
        if moved:
            with client.pipeline(transaction=False) as pipeline:
                for at in moved:
                    pipeline.execute_command(*commands[at])
                for at, reply in zip(moved, pipeline.execute(raise_on_error=False), strict=True):
                    replies[at] = reply
        return replies

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Translate what redis raises. A Cluster's map may be out of date after a failure: it is made again.

        Raises
        ------
        SharedError
            The far side failed, with what to do.
        """
        redis = _redis()
        try:
            yield
        except (redis.RedisError, OSError, ValueError) as error:
            if isinstance(error, SharedError):
                raise
            if self.is_cluster:
                self.close()
            raise _translated(error, self.name) from error

    def info(self) -> dict[str, Any]:
        """Return the server's own facts, summed or the least of a Cluster's nodes; none if the user may not ask."""
        redis = _redis()
        with self.asking():
            try:
                return self._cluster_info() if self.is_cluster else dict(self.client("lookups").info())
            except redis.exceptions.NoPermissionError:
                return {}

    def close(self) -> None:
        """Release all connections; what is asked later makes new ones."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def _connect(self, use: str) -> Any:
        redis = _redis()
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options: dict[str, Any] = {
            "socket_timeout": self._options.timeout_s,
            "socket_connect_timeout": self._options.connect_timeout_s,
            "socket_keepalive": True,
            "retry": Retry(NoBackoff(), 0),  # the breaker decides when to try again
            "protocol": 2,
        }
        transport = _for_large_values() if use == "data" else {}
        password = os.environ.get(PASSWORD_VARIABLE)
        if password and not urlsplit(self._url).password:
            options["password"] = password
        if self.is_cluster:
            return self._connect_cluster(options, transport)
        most = _LOOKUP_CONNECTIONS if use == "lookups" else self._options.concurrency
        pool = redis.BlockingConnectionPool.from_url(
            self._url, max_connections=most, timeout=self._options.timeout_s, **transport, **options
        )
        return redis.Redis(connection_pool=pool)

    def _connect_cluster(self, options: dict[str, Any], transport: dict[str, Any]) -> Any:
        from redis import ConnectionPool
        from redis.cluster import RedisCluster

        class Pool(ConnectionPool):
            """A Cluster's client hands neither packer nor read size on to its nodes, but the class of their pools."""

            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**{**kwargs, **transport})

        options = {**options, "connection_pool_class": Pool}
        parts = urlsplit(self._url)
        user, at, hosts = parts.netloc.rpartition("@")
        failure: Exception | None = None
        for host in hosts.split(","):
            url = urlunsplit((parts.scheme, f"{user}{at}{host}", parts.path, parts.query, ""))
            try:
                return RedisCluster.from_url(url, require_full_coverage=False, **options)
            except Exception as error:  # noqa: BLE001 - the next host may answer
                failure = error
        assert failure is not None
        raise failure

    def _cluster_info(self) -> dict[str, Any]:
        client = self.client("lookups")
        nodes = list(client.info(target_nodes=client.PRIMARIES).values())
        if nodes and not isinstance(nodes[0], dict):  # of a single node, redis-py returns its fields alone
            nodes = [client.info(target_nodes=client.PRIMARIES)]
        sums = {name: sum(int(node.get(name, 0)) for node in nodes) for name in ("used_memory", "evicted_keys")}
        smallest = min((int(node.get("maxmemory", 0)) for node in nodes), default=0)
        return {**(nodes[0] if nodes else {}), **sums, "maxmemory": smallest, "nodes": len(nodes)}


def _exchange(batches: Sequence[tuple[Any, Sequence[Command]]]) -> list[list[Any]]:
    """Send each pool's commands, then read all replies. An error that is a reply is returned in its place.

    A connection whose replies were not all read is closed: another's question would be answered with them.
    """
    redis = _redis()
    replies: list[list[Any]] = []
    connections: list[Any] = []
    with ExitStack() as stack:
        try:
            for pool, commands in batches:
                connection = pool.get_connection()
                stack.callback(pool.release, connection)
                connections.append(connection)
                connection.send_packed_command(connection.pack_commands(commands))
            for connection, (_, commands) in zip(connections, batches, strict=True):
                answers = []
                for _ in commands:
                    try:
                        answers.append(connection.read_response())
                    except redis.ResponseError as error:
                        answers.append(error)
                replies.append(answers)
        except BaseException:
            for connection in connections[len(replies) :]:
                connection.disconnect()
            raise
    return replies


def _for_large_values() -> dict[str, Any]:
    """Return how connections send values from where they are, and read much at once.

    hiredis' packer copies values several times, but is the faster one for small commands. With redis-py's own 64 KiB a
    read, four threads fetch large values a quarter slower.
    """
    from redis.connection import PythonRespSerializer

    return {"command_packer": PythonRespSerializer(6000, _encode), "socket_read_size": _READ_BYTES}


def _encode(value: Any) -> Any:
    return value if isinstance(value, (bytes, memoryview)) else str(value).encode()


def _redis() -> Any:
    try:
        import redis
    except ImportError as error:
        raise SharedError("the client for Redis is not installed", "pip install 'promptdb[redis]'") from error
    return redis


def _redirections() -> tuple[type[Exception], ...]:
    """Return what a node answers that does not have, or no longer has, a key's slot."""
    from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

    return AskError, ClusterDownError, MovedError, TryAgainError


_HINTS = (
    ("AuthenticationError", "wrong user or password", "check the URL, and PROMPTDB_SHARED_PASSWORD"),
    ("NoPermissionError", "the user may not do that", "docs/team.md has the ACL that a client needs"),
    ("OutOfMemoryError", "the server is full", "raise maxmemory, or set maxmemory-policy allkeys-lru"),
    ("ReadOnlyError", "the server is a replica, and takes no writes", "name its primary, or use redis+cluster://"),
    ("TimeoutError", "no answer in time", "check the network; timeout_s=SECONDS in the URL waits longer"),
    ("ConnectionError", "it cannot be reached", "check host, port, TLS and the network"),
)


def _translated(error: Exception, name: str) -> SharedError:
    # Of a pipeline, redis-py quotes the command, value and all.
    text = " ".join(str(error).rpartition("caused error: ")[2].split()) or type(error).__name__
    if "CERTIFICATE" in text.upper() or "SSL" in text:
        return SharedError(f"{name}: TLS fails: {text}", "check the certificate's dates and name, and ssl_ca_certs")
    kinds = [kind.__name__ for kind in type(error).__mro__]
    for kind, what, hint in _HINTS:
        if kind in kinds or (kind == "AuthenticationError" and "WRONGPASS" in text):
            return SharedError(f"{name}: {what}: {text}", hint)
    return SharedError(f"{name}: {text}", "check the URL of the shared store")
