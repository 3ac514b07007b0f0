"""Redis and Valkey, standalone or Cluster, as a far store.

A value is one key of its own, the manifest (size, checksum, and the value itself if that is small), written last, and
parts of 4 MiB under keys beside it: who waits behind a large reply waits for no more than a part. A part that was
evicted makes the value a miss, and so does a checksum that does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple

from xxhash import xxh3_128

from promptdb.far import Bytes, Pieces, TooLargeError
from promptdb.redis_connections import RedisConnections
from promptdb.shared_options import SharedOptions

PART_BYTES = 4 << 20
# Values up to this size stand in their manifest: one round trip.
INLINE_BYTES = 64 << 10
MOST_BYTES = 512 << 20  # Redis takes no longer strings, and one as long takes minutes
_MANIFEST = Struct("<4sQ16s")
_MAGIC = b"pdb1"
_SCAN = 1000
_LOOKUP_KEYS = 4096


class _Manifest(NamedTuple):
    size: int
    checksum: bytes

    @property
    def num_parts(self) -> int:
        return num_parts(self.size)


def num_parts(size: int) -> int:
    """Return how many keys a value of a size takes besides its manifest."""
    return 0 if size <= INLINE_BYTES else -(-size // PART_BYTES)


class FarRedis:
    """A Redis or Valkey server, or Cluster; see :class:`promptdb.far.FarStore` for the contract.

    Parameters
    ----------
    url : ``redis://[USER@]HOST[:PORT][/DATABASE]``, ``rediss://`` for TLS, ``redis+cluster://HOST:PORT[,HOST:PORT]...``
        and ``rediss+cluster://`` for a Cluster. In its query, ``prefix`` stands before all keys (``promptdb`` unless
        given), and what else there is goes to redis-py: ``ssl_ca_certs``, ``ssl_certfile``, ...
    """

    def __init__(self, url: str, options: SharedOptions) -> None:
        self._connections = RedisConnections(url, options)
        self._run = self._connections.run
        self._asking = self._connections.asking
        self._prefix = self._connections.prefix
        self._options = options
        self._most_bytes: int | None = None
        self.name = self._connections.name
        self.first_batch = _LOOKUP_KEYS
        self.has_leases = True

    def _key(self, key: str) -> str:
        return self._prefix + key

    # The contract

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """Return which values are there; refreshes their age, and that of all their parts. At most two round trips."""
        with self._asking():
            heads = self._run("lookups", [("GETRANGE", self._key(key), 0, _MANIFEST.size - 1) for key in keys])
            manifests = [_read_manifest(head) for head in heads]
            touches = [
                (at, ("TOUCH", _part(self._key(key), number)))
                for at, (key, manifest) in enumerate(zip(keys, manifests, strict=True))
                for number in range(manifest.num_parts if manifest else 0)
            ]
            found = [manifest is not None for manifest in manifests]
            for (at, _), there in zip(touches, self._run("lookups", [each for _, each in touches]), strict=True):
                found[at] = found[at] and bool(there)
            return found

    def get(self, keys: Sequence[str], sizes: Sequence[int] | None = None) -> list[Pieces | None]:
        """Return values. One round trip if they are small or their sizes are known, else two."""
        with self._asking():
            if keys and sizes is None and not self._connections.is_cluster:  # one command has one reply to parse
                return self._complete(keys, self._run("lookups", [("MGET", *map(self._key, keys))])[0])
            # The sizes may be a forger's.
            expected = [num_parts(min(size, MOST_BYTES)) for size in sizes] if sizes is not None else [0] * len(keys)
            use = "data" if any(expected) else "lookups"
            commands = []
            for key, number in zip(keys, expected, strict=True):
                commands.append(("GET", self._key(key)))
                commands += [("GET", _part(self._key(key), part)) for part in range(number)]
            replies = iter(self._run(use, commands))
            heads, parts = [], []
            for number in expected:
                head, *following = [next(replies) for _ in range(1 + number)]
                heads.append(head)
                parts.append(following)
            return self._complete(keys, heads, parts)

    def _complete(
        self, keys: Sequence[str], heads: Sequence[bytes | None], parts: Sequence[list[bytes | None]] | None = None
    ) -> list[Pieces | None]:
        """Return values from their manifests and the parts that came with those; others are asked for."""
        found: list[Pieces | None] = []
        for at, (key, head) in enumerate(zip(keys, heads, strict=True)):
            manifest = _read_manifest(head)
            if manifest is None or head is None:
                found.append(None)
                continue
            own = parts[at] if parts is not None else []
            if manifest.num_parts and manifest.num_parts != len(own):
                names = [_part(self._key(key), number) for number in range(manifest.num_parts)]
                own = self._run("data", [("GET", name) for name in names])
            found.append(_whole(manifest, head, own))
        return found

    def put(self, items: Sequence[tuple[str, Bytes]]) -> list[bool]:
        """Create values: their parts first, their manifests when all parts are there."""
        lives = ("PX", round(1000 * self._options.ttl_s)) if self._options.ttl_s else ()
        with self._asking():
            manifests, parts = [], []
            for key, value in items:
                view = memoryview(value)
                self._check_size(view.nbytes)
                head = _MANIFEST.pack(_MAGIC, view.nbytes, xxh3_128(view).digest())
                count = num_parts(view.nbytes)
                inline = bytes(view) if not count else b""
                manifests.append(("SET", self._key(key), head + inline, "NX", *lives))
                for number in range(count):
                    part = view[number * PART_BYTES : (number + 1) * PART_BYTES]
                    parts.append(("SET", _part(self._key(key), number), part, *lives))
            for command in parts:
                self._run("data", [command])
            return [reply is not None for reply in self._run("data", manifests)]

    def _check_size(self, size: int) -> None:
        """Refuse what would push everything else out: under allkeys-lru, a server takes even what it cannot hold."""
        if self._most_bytes is None:
            most = int(self.facts().get("maxmemory_bytes", 0))
            self._most_bytes = min(MOST_BYTES, most // 4) if most else MOST_BYTES
        if size > self._most_bytes:
            raise TooLargeError(
                f"{self.name}: a value of {size:,} bytes, where {self._most_bytes:,} are sensible",
                "raise maxmemory, or create the store with a smaller chunk_tokens",
            )

    def delete(self, keys: Sequence[str]) -> None:
        """Remove values: the manifest first, so that nobody reads half of one."""
        with self._asking():
            heads = self._run("lookups", [("GETRANGE", self._key(key), 0, _MANIFEST.size - 1) for key in keys])
            self._run("lookups", [("UNLINK", self._key(key)) for key in keys])
            manifests = zip(keys, map(_read_manifest, heads), strict=True)
            names = [
                _part(self._key(key), number)
                for key, manifest in manifests
                for number in range(manifest.num_parts if manifest else 0)
            ]
            self._run("lookups", [("UNLINK", name) for name in names])

    def lease(self, keys: Sequence[str], holder: str, ttl_s: float) -> list[float]:
        """Take keys that end by themselves. One round trip, and one more if others have some."""
        life_ms = max(1, round(1000 * ttl_s))
        names = [self._key(key) for key in keys]
        with self._asking():
            taken = self._run("lookups", [("SET", name, holder, "NX", "PX", life_ms) for name in names])
            refused = [at for at, reply in enumerate(taken) if reply is None]
            replies = iter(
                self._run("lookups", [(ask, names[at]) for at in refused for ask in ("GET", "PTTL")]),
            )
        left_s = [0.0] * len(keys)
        for at in refused:
            owner, left_ms = next(replies), next(replies)
            if owner is not None and owner != holder.encode() and left_ms > 0:
                left_s[at] = left_ms / 1000
        return left_s

    def release(self, keys: Sequence[str], holder: str) -> None:
        """Remove what a holder has. What another takes between question and removal goes too, which is harmless."""
        names = [self._key(key) for key in keys]
        with self._asking():
            owners = self._run("lookups", [("GET", name) for name in names])
            own = [name for name, owner in zip(names, owners, strict=True) if owner == holder.encode()]
            self._run("lookups", [("UNLINK", name) for name in own])

    def list(self, prefix: str) -> Iterator[str]:
        """Yield keys, walking over all of the server's."""
        pattern = "".join(f"\\{each}" if each in "*?[]^\\" else each for each in self._key(prefix)) + "*"
        with self._asking():
            for name in self._connections.client("lookups").scan_iter(match=pattern, count=_SCAN):
                key = name.decode("ascii", "replace").removeprefix(self._prefix)
                if "#" not in key:
                    yield key

    def facts(self) -> dict[str, str | int]:
        """Return version, memory and policy, as far as the user may ask for them."""
        found = self._connections.info()
        if not found:
            return {}
        version = found.get("valkey_version", found.get("redis_version", "?"))
        named: dict[str, str | int] = {
            "server": f"{found.get('server_name', 'redis')} {version}",
            "maxmemory_bytes": int(found.get("maxmemory", 0)),
            "used_bytes": int(found.get("used_memory", 0)),
            "policy": str(found.get("maxmemory_policy", "?")),
            "evicted_keys": int(found.get("evicted_keys", 0)),
        }
        return {**named, **({"nodes": found["nodes"]} if "nodes" in found else {})}

    def close(self) -> None:
        """Release all connections."""
        self._connections.close()


def _part(key: str, number: int) -> str:
    return f"{key}#{number}"


def _read_manifest(head: bytes | None) -> _Manifest | None:
    if not head or len(head) < _MANIFEST.size:
        return None
    magic, size, checksum = _MANIFEST.unpack_from(head)
    return _Manifest(size, checksum) if magic == _MAGIC and size <= MOST_BYTES else None


def _whole(manifest: _Manifest, head: bytes, parts: Sequence[bytes | None]) -> Pieces | None:
    """Return a value's pieces, or None if one is gone or of another value."""
    pieces: list[Bytes] = [memoryview(head)[_MANIFEST.size :]] if not manifest.num_parts else []
    for part in parts if manifest.num_parts else ():
        if part is None:
            return None
        pieces.append(part)
    check = xxh3_128()
    for piece in pieces:
        check.update(piece)
    is_sound = sum(map(len, pieces)) == manifest.size and check.digest() == manifest.checksum
    return pieces if is_sound else None
