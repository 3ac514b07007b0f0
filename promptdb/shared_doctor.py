"""What may go wrong with the store that is shared with other machines: found by asking it, with what to do about it."""

from __future__ import annotations

import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from urllib.parse import parse_qs, urlsplit

from promptdb.db import PromptDB
from promptdb.errors import PromptDBError, SharedError
from promptdb.far import FarStore, check_not_sealed
from promptdb.far_open import open_far
from promptdb.finding import ERROR, NOTE, OK, WARNING, Finding
from promptdb.outbox import oldest_unix_s, waiting
from promptdb.shared_counts import read_shared_counts
from promptdb.shared_options import SharedOptions, resolve, without_secrets
from promptdb.signing import Signer, Trust

_PROBE_BYTES = 1024
_MOST_COUNTED = 1 << 20
_LONG_WAIT_S = 600.0
_RECENT_S = 3600.0
_FEW_DAYS = 14
_FULL_SHARE = 0.95
_DAY_S = 86_400.0


def examine_shared(db: PromptDB, shared: str | None = None) -> Iterator[Finding]:
    """Ask the store that a store shares what it can do; nothing if there is none.

    Parameters
    ----------
    db : the local store, which may be open for reading only.
    shared : as for :class:`PromptDB`.

    Notes
    -----
    Waits for the timeouts of the options, a few times at most. Writes a few bytes there, and removes them, unless the
    shared store may only be read.
    """
    try:
        with db.read() as snapshot:
            options = resolve(shared, False, snapshot.reader)
        if options is None:
            return
        yield from _keys(options)
        yield from _queue(db)
        yield from _last_failure(db)
        far = open_far(options)
    except PromptDBError as error:
        yield Finding(ERROR, f"shared store: {error.message}", error.hint)
        return
    try:
        yield from _certificates(options)
        yield from _answers(far, options)
    finally:
        far.close()


def _keys(options: SharedOptions) -> Iterator[Finding]:
    """Yield what is wrong with the keys for signing."""
    for path, read in ((options.sign_with, Signer), (options.trust, Trust)):
        if path:
            try:
                read(path)
            except SharedError as error:
                yield Finding(ERROR, f"shared store: {error.message}", error.hint)
            else:
                yield Finding(OK, f"shared store: the keys in {Path(path).name} can be read")


def _queue(db: PromptDB) -> Iterator[Finding]:
    with db.read() as snapshot:
        number, oldest = len(waiting(snapshot.reader, _MOST_COUNTED)), oldest_unix_s(snapshot.reader)
    if oldest is None:
        yield Finding(OK, "shared store: nothing waits to be sent")
        return
    age_s = max(0.0, time.time() - oldest)
    what = f"shared store: {number:,} spans wait to be sent, the oldest for {_age(age_s)}"
    if age_s > _LONG_WAIT_S:
        yield Finding(WARNING, what, "`promptdb push` sends them, or tells why it cannot")
    else:
        yield Finding(NOTE, what, "they are sent as long as a program has the store open")


def _last_failure(db: PromptDB) -> Iterator[Finding]:
    """Yield what failed a program not long ago: it may have left the far side alone since, and computed everything."""
    with db.read() as snapshot:
        totals = read_shared_counts(snapshot.reader)
    age_s = time.time() - totals.last_failure_unix_s
    if totals.failures and age_s < _RECENT_S:
        yield Finding(
            WARNING,
            f"shared store: it failed {_age(max(0.0, age_s))} ago: {totals.last_failure}",
            "after a failure it is left alone for a second, and up to a minute after more; programs compute meanwhile",
        )


def _age(seconds: float) -> str:
    for unit, size_s in (("days", _DAY_S), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:,.0f} {unit}"
    return f"{seconds:.0f} s"


def _answers(far: FarStore, options: SharedOptions) -> Iterator[Finding]:
    """Yield whether the far side answers, and what it says of itself; then whether it takes what is sent."""
    key = f"x/{secrets.token_hex(8)}"
    try:
        if not options.key:
            check_not_sealed(far)
        far.get([key])
        began = perf_counter()
        far.get([key])
        trip_s = perf_counter() - began
        facts = far.facts()
    except SharedError as error:
        yield Finding(ERROR, f"shared store: {error.message}", error.hint)
        return
    yield Finding(OK, f"shared store: {far.name} answers in {1000 * trip_s:,.3g} ms")
    if options.key:
        yield Finding(OK, "shared store: what is sent is encrypted with the team's key")
    yield from _room(facts)
    if options.readonly:
        yield Finding(OK, "shared store: only read from here")
        return
    try:
        far.put([(key, secrets.token_bytes(_PROBE_BYTES))])
    except SharedError as error:
        hint = error.hint or "check the rights of the user"
        yield Finding(ERROR, f"shared store: it takes nothing: {error.message}", f"{hint}; readonly=1 for readers")
    else:
        yield Finding(OK, "shared store: it takes what is sent")
    finally:
        with suppress(SharedError):
            far.delete([key])


def _room(facts: dict[str, str | int]) -> Iterator[Finding]:
    """Yield whether a server has room left, and what it does without. Of layers, facts have a number before them."""
    for name in facts:
        if not name.endswith("maxmemory_bytes"):
            continue
        start = name.removesuffix("maxmemory_bytes")
        most, used = int(facts[name]), int(facts.get(f"{start}used_bytes", 0))
        policy = str(facts.get(f"{start}policy", "?"))
        if not most:
            yield Finding(
                WARNING,
                "shared store: the server has no maxmemory",
                "it grows until its machine fails: set maxmemory, and maxmemory-policy allkeys-lru",
            )
        elif policy == "noeviction" and used > _FULL_SHARE * most:
            yield Finding(
                ERROR,
                f"shared store: the server is full: {used / 1e6:,.0f} of {most / 1e6:,.0f} MB, and evicts nothing",
                "set maxmemory-policy allkeys-lru, or raise maxmemory",
            )
        elif policy == "noeviction":
            yield Finding(
                NOTE,
                "shared store: the server takes nothing more when it is full (noeviction)",
                "maxmemory-policy allkeys-lru forgets what nobody asks for instead",
            )
        elif not policy.startswith("allkeys"):
            yield Finding(
                WARNING,
                f"shared store: the server evicts by {policy}, which spares what has no time to live",
                "set maxmemory-policy allkeys-lru",
            )
        else:
            yield Finding(OK, f"shared store: {used / 1e6:,.0f} of {most / 1e6:,.0f} MB in use, evicts by {policy}")


def _certificates(options: SharedOptions) -> Iterator[Finding]:
    """Yield how long the certificates of servers hold. What is wrong with one is told by whoever connects next."""
    for url in options.url.split():
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if parts.scheme.startswith("rediss"):
            hosts = parts.netloc.rpartition("@")[2].split(",")
            addresses = [_address(host, 6379) for host in hosts]
        elif query.get("endpoint", "").startswith("https://"):
            addresses = [_address(urlsplit(query["endpoint"]).netloc, 443)]
        else:
            continue
        for host, port in addresses:
            with suppress(OSError, ValueError):
                ends = _not_after(host, port, query, options.connect_timeout_s)
                yield _certificate(f"{without_secrets(url)}, {host}", (ends - time.time()) / _DAY_S)


def _certificate(where: str, days: float) -> Finding:
    if days < _FEW_DAYS:
        what = f"shared store: the certificate of {where} expires in {days:.1f} days"
        return Finding(WARNING, what, "renew it on the server: when it has ended, nobody can connect")
    return Finding(OK, f"shared store: the certificate of {where} holds for {days:,.0f} days")


def _address(netloc: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{netloc}")
    return parts.hostname or "localhost", parts.port or port


def _not_after(host: str, port: int, query: dict[str, str], timeout_s: float) -> float:
    """Return when a server's certificate ends, in seconds since 1970. Raises :class:`OSError` if it cannot be had."""
    context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
    if "ssl_certfile" in query:
        context.load_cert_chain(query["ssl_certfile"], query.get("ssl_keyfile"))
    with (
        socket.create_connection((host, port), timeout_s) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        found = secured.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(found["notAfter"])))
