"""A walk over the whole store that finds everything that does not hold, and one that takes it out."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from promptdb.activations import Series, entry_of
from promptdb.artifact_records import damaged, problems_of
from promptdb.audit import Audit, unsound_settings
from promptdb.errors import CorruptDataError
from promptdb.format import (
    ACTIVATIONS,
    ARTIFACTS,
    BLOBS,
    CHECKPOINTS,
    CHILDREN,
    LOGITS,
    META,
    MODELS,
    NODES,
    ROOTS,
    TOKENIZERS,
    TOTALS,
    NodeRecord,
    pack_root,
    unpack_record,
    unpack_root,
)
from promptdb.keys import DIGEST_BYTES, PrefixHasher, Root, child_key, node_id
from promptdb.rebuild import upgrade
from promptdb.snapshot import Snapshot, Verified, logits_owner
from promptdb.tables import Reader, Writer


@dataclass(frozen=True)
class Problem:
    """Something in the store that does not hold: in which table, under which key (hex), and what."""

    table: str
    key: str
    what: str


def verify(reader: Reader) -> list[Problem]:
    """Check every record, blob, index entry and total of a snapshot.

    Returns
    -------
    list of Problem
        Empty if the store is sound.

    Notes
    -----
    Reads everything: as fast as checksums go, about 10 GB/s from the page cache. Memory: a few dozen bytes per node.
    """
    problems: list[Problem] = []
    snapshot = Snapshot(reader, Verified("always"))
    totals: dict[bytes, Counter[str]] = defaultdict(Counter)
    roots: dict[bytes, bytes] = {}  # root digest by node
    spans: dict[bytes, tuple[int, int]] = {}  # by node: length in tokens, and start
    starts: dict[bytes, bytes] = {}  # d(0) by root digest
    blob_keys: set[bytes] = set()
    child_keys: set[bytes] = set()
    audit = Audit(reader)

    def report(table: str, key: bytes, what: str) -> None:
        problems.append(Problem(table, key.hex(), what))

    for node, value in reader.scan(NODES):
        try:
            record = NodeRecord.unpack(node, value)
            if node_id(record.child_hash, record.span) != node:
                raise CorruptDataError("the record belongs to another span")
        except CorruptDataError as error:
            report(NODES, node, error.message)
            continue
        root = roots[node] = record.root.digest
        spans[node] = record.num_tokens, record.start
        audit.node(node, record, len(value))
        if root not in starts:
            starts[root] = PrefixHasher(root, b"").at(0)
        if (record.start == 0) != (record.child_hash == starts[root]):
            report(NODES, node, f"its root and its start, {record.start}, do not agree")
        for kind in record.blobs:
            blob_key = node + kind.encode()
            blob_keys.add(blob_key)
            try:
                if snapshot.blob(node, record, kind) is None:
                    report(BLOBS, blob_key, "missing")
            except CorruptDataError as error:
                report(BLOBS, blob_key, error.message)
        totals[root].update(num_nodes=1, num_tokens=record.num_tokens, blob_bytes=record.size_bytes)
        key = child_key(record.child_hash, record.span)
        child_keys.add(key)
        entry = reader.get(CHILDREN, key)
        if entry is None:
            report(CHILDREN, key, "a node is not in the child index")
        elif bytes(entry) != node + record.span:
            report(CHILDREN, key, "an entry names another node or other tokens")
    for key in reader.keys(BLOBS):
        if key not in blob_keys:
            report(BLOBS, key, "no record owns this blob")
    for key in reader.keys(CHILDREN):
        if key not in child_keys:
            report(CHILDREN, key, "an entry without a node")
    for digest, value in reader.scan(LOGITS):
        try:
            snapshot.logits(digest)
        except CorruptDataError as error:
            report(LOGITS, digest, error.message)
        owner = logits_owner(value)
        if owner in roots:
            totals[roots[owner]]["blob_bytes"] += len(value)
            audit.logits(digest, owner, len(value))
        else:
            report(LOGITS, digest, "no node owns these logits")
    for key, value in reader.scan(ACTIVATIONS):
        owner = key[:DIGEST_BYTES]
        if owner not in spans:
            report(ACTIVATIONS, key, "no node owns these activations")
            continue
        try:
            entry_of(snapshot, owner, Series.of_key(key), *spans[owner])
        except CorruptDataError as error:
            report(ACTIVATIONS, key, error.message)
        totals[roots[owner]]["blob_bytes"] += len(value)
        audit.activations(owner, key, len(value))
    for digest, value in reader.scan(ROOTS):
        try:
            root_of, stored = unpack_root(digest, value)
        except CorruptDataError as error:
            totals.pop(digest, None)
            report(ROOTS, digest, error.message)
            continue
        if root_of.digest != digest:
            report(ROOTS, digest, "the fields do not give this digest")
        counted = totals.pop(digest, Counter())
        if any(amount != counted[name] for name, amount in stored.items()):
            report(ROOTS, digest, f"totals are {stored}, counted {dict(counted)}")
    for digest in totals:
        report(ROOTS, digest, "missing")
    for key, what in problems_of(reader):
        report(ARTIFACTS, key, what)
    for table in (META, MODELS, TOKENIZERS, CHECKPOINTS):
        for key, value in reader.scan(table):
            try:
                unpack_record(key, value)
            except CorruptDataError as error:
                report(table, key, error.message)
    for table, key, what in audit.findings():
        report(table, key, what)
    return problems


def repair(writer: Writer, *, read_blobs: bool) -> int:
    """Take out every span that does not hold, and make the indexes and the totals again from those that do.

    Parameters
    ----------
    writer : a transaction; nobody else writes until it ends.
    read_blobs : check the content of blobs too. Without it, nothing but records is read: about 20 microseconds each.

    Returns
    -------
    int
        How many spans went. They are computed again when somebody asks for them.
    """
    snapshot = Snapshot(writer, Verified("always"))
    totals: dict[Root, Counter[str]] = defaultdict(Counter)
    roots: dict[bytes, Root] = {}  # of nodes that hold
    spans: dict[bytes, tuple[int, int]] = {}
    blob_keys: set[bytes] = set()
    entries: dict[bytes, bytes] = {}
    doomed = []
    for node, value in writer.scan(NODES):
        try:
            record = NodeRecord.unpack(node, value)
            if node_id(record.child_hash, record.span) != node:
                raise CorruptDataError("the record belongs to another span")
            for kind in record.blobs:
                missing = writer.size(BLOBS, node + kind.encode()) is None
                if missing or (read_blobs and snapshot.blob(node, record, kind) is None):
                    raise CorruptDataError(f"blob {kind} is missing")
        except CorruptDataError:
            doomed.append(node)
            continue
        roots[node], spans[node] = record.root, (record.num_tokens, record.start)
        totals[record.root].update(num_nodes=1, num_tokens=record.num_tokens, blob_bytes=record.size_bytes)
        blob_keys.update(node + kind.encode() for kind in record.blobs)
        entries[child_key(record.child_hash, record.span)] = node + record.span
    logits = []
    for digest, value in writer.scan(LOGITS):
        try:
            owner = logits_owner(value)
            snapshot.logits(digest)
            totals[roots[owner]]["blob_bytes"] += len(value)
        except (CorruptDataError, KeyError):
            logits.append(digest)
    records = []
    for key, value in writer.scan(ACTIVATIONS):
        owner = key[:DIGEST_BYTES]
        try:
            entry_of(snapshot, owner, Series.of_key(key), *spans[owner])
            totals[roots[owner]]["blob_bytes"] += len(value)
        except (CorruptDataError, KeyError):
            records.append((ACTIVATIONS, key))
    for table in (MODELS, TOKENIZERS, CHECKPOINTS):
        for key, value in writer.scan(table):
            try:
                unpack_record(key, value)
            except CorruptDataError:
                records.append((table, key))
    records += [(ARTIFACTS, key) for key in damaged(writer)]
    records += unsound_settings(writer)
    records += [(NODES, node) for node in doomed] + [(LOGITS, digest) for digest in logits]
    records += [(BLOBS, key) for key in writer.keys(BLOBS) if key not in blob_keys]
    records += [(CHILDREN, key) for key in writer.keys(CHILDREN) if key not in entries]
    records += [(ROOTS, key) for key in writer.keys(ROOTS)]
    for table, key in records:
        writer.delete(table, key)
    for key, content in entries.items():
        standing = writer.get(CHILDREN, key)
        if standing is None or bytes(standing) != content:
            writer.put(CHILDREN, key, content)
    for root, amounts in totals.items():
        writer.put(ROOTS, root.digest, pack_root(root, {name: amounts[name] for name in TOTALS}))
    upgrade(writer)
    return len(doomed)
