"""What may go wrong with a store, or already has, told without changing anything."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from promptdb.db import PromptDB
from promptdb.errors import PromptDBError
from promptdb.filesystem import REMOTE_TYPES, filesystem_type
from promptdb.finding import ERROR, LEVELS, NOTE, OK, WARNING, Finding
from promptdb.format import FORMAT_VERSION
from promptdb.shared_doctor import examine_shared
from promptdb.tables import Reading
from promptdb.version import __version__

# The ranges that are supported, as in the package's requirements.
_OLDEST = {"torch": (2, 11), "transformers": (5, 17), "lmdb": (1, 6)}
_LITTLE_SPACE_BYTES, _LITTLE_SPACE_SHARE = 1 << 30, 0.05
# A snapshot that was followed by so many transactions keeps their old pages from being used again.
_MANY_TRANSACTIONS = 100
_SLACK_SHARE, _SLACK_BYTES = 0.5, 64 << 20


def examine(path: Path, shared: str | None = None) -> list[Finding]:
    """Look at a store, its disk, who has it open, the store that it shares, and the libraries that are installed.

    Parameters
    ----------
    path : directory of the store.
    shared : URL of the shared store; by default that of the environment, else of the store's setting.

    Returns
    -------
    list of Finding
        The worst first. Reads no blobs: see :meth:`PromptDB.verify` for damage.
    """
    findings = list(_place(path))
    try:
        with PromptDB(path, readonly=True) as db:
            for look in (_disk, _limits, _readers, _damage, _models):
                findings += look(db)
            findings += examine_shared(db, shared)
    except PromptDBError as error:
        findings.append(Finding(ERROR, error.message, error.hint))
    findings += _versions()
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _place(path: Path) -> Iterator[Finding]:
    kind = filesystem_type(path if path.exists() else path.parent)
    if kind in REMOTE_TYPES:
        yield Finding(
            ERROR, f"the store is on a network filesystem ({kind})", "LMDB's locks do not hold there: use a local disk"
        )
    else:
        yield Finding(OK, f"filesystem: {kind or 'of unknown type'}")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return  # to open it says more
    if mode & 0o077:
        yield Finding(WARNING, f"others may enter the directory (mode {mode:04o})", f"chmod 700 {path}")
    else:
        yield Finding(OK, "only its owner can read the store")
    if not os.access(path, os.W_OK):
        yield Finding(WARNING, "this user cannot write to the directory", "check its owner and permissions")


def _disk(db: PromptDB) -> Iterator[Finding]:
    found = db.stat()
    free, size = found["free_bytes"], found["file_bytes"]
    may_grow = found["quota_bytes"] * 1.35 - size if found["quota_bytes"] else 0.0
    if free < min(_LITTLE_SPACE_BYTES, max(size * _LITTLE_SPACE_SHARE, 16 << 20)):
        yield Finding(
            WARNING,
            f"{free / 1e6:,.0f} MB of the disk are free",
            "free space, or set a quota (`promptdb limits --quota`); a full disk evicts with every put",
        )
    elif may_grow > free:
        yield Finding(
            WARNING,
            f"the quota lets the file grow by {may_grow / 1e9:,.1f} GB; {free / 1e9:,.1f} GB of the disk are free",
            "lower the quota (`promptdb limits --quota`)",
        )
    else:
        yield Finding(OK, f"disk: {free / 1e9:,.1f} GB free")
    slack = size - found.get("charged_bytes", size)
    if slack > _SLACK_BYTES and slack > _SLACK_SHARE * size:
        yield Finding(NOTE, f"{slack / 1e6:,.0f} MB of the file are not in use", "`promptdb compact` gives them back")


def _limits(db: PromptDB) -> Iterator[Finding]:
    found = db.stat()
    quota, charged = found["quota_bytes"], found.get("charged_bytes")
    if charged is None:
        yield Finding(
            NOTE, f"the store is of format {db.format_version}", "the next put brings it to the newest; nothing is lost"
        )
    elif not quota:
        yield Finding(
            NOTE, "there is no quota: the store grows until the disk is full", "`promptdb limits --quota 20GB`"
        )
    elif found["pinned_bytes"] > 0.9 * quota:
        yield Finding(
            WARNING,
            f"{found['pinned_bytes'] / quota:.0%} of the quota are pinned",
            "puts will be refused: `promptdb pins`, `promptdb unpin`, or raise the quota",
        )
    else:
        yield Finding(OK, f"quota: {charged / quota:.0%} of {quota / 1e9:,.1f} GB in use")
    if found.get("num_orphans"):
        yield Finding(NOTE, f"{found['num_orphans']:,} spans stand on removed ones", "`promptdb gc` removes them")


def _readers(db: PromptDB) -> Iterator[Finding]:
    last, readings = db.readings()
    dead = [each for each in readings if not _is_alive(each.pid)]
    if dead:
        yield Finding(
            WARNING,
            f"{len(dead)} snapshots are held by processes that have died ({_pids(dead)})",
            "old pages are kept for them; the next process that opens the store for writing clears them",
        )
    late = [each for each in readings if each not in dead and each.transaction >= 0]
    late = [each for each in late if last - each.transaction > _MANY_TRANSACTIONS]
    if late:
        most = max(last - each.transaction for each in late)
        yield Finding(
            WARNING,
            f"processes {_pids(late)} hold snapshots that {most:,} transactions have followed",
            "the file grows meanwhile: end them, or let them leave `db.read()` sooner",
        )
    if not dead and not late:
        yield Finding(OK, f"readers: {len(readings)}, none of them late")


def _pids(readings: list[Reading]) -> str:
    return ", ".join(sorted({str(each.pid) for each in readings}))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _damage(db: PromptDB) -> Iterator[Finding]:
    quarantined = sum(served.num_quarantined for served in db.served().values())
    if quarantined:
        yield Finding(
            WARNING,
            f"{quarantined:,} damaged spans were taken out and computed again",
            "`promptdb verify` looks for more; look at the disk and the memory, too",
        )
    else:
        yield Finding(OK, "no damage was met while reading")


def _models(db: PromptDB) -> Iterator[Finding]:
    installed = {name: _installed(name) for name in ("transformers", "torch")}
    for weights_id, fields in db.registry.models().items():
        probed = dict(_pairs(str(fields.get("probed_with", ""))))
        newer = [
            f"{name} {probed[name]}, now {version}"
            for name, version in installed.items()
            if version and probed.get(name, version) != version
        ]
        if newer:
            yield Finding(
                NOTE,
                f"{fields.get('name') or weights_id[:12]} was last run with {'; '.join(newer)}",
                "it is tried again when it is loaded next; a strict engine reuses nothing of other versions",
            )


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(","):
        name, _, value = part.strip().partition(" ")
        if value:
            yield name, value


def _versions() -> Iterator[Finding]:
    yield Finding(OK, f"promptdb {__version__}, store format {FORMAT_VERSION}")
    for name, oldest in _OLDEST.items():
        version = _installed(name)
        if version is None:
            yield Finding(WARNING, f"{name} is not installed", f"pip install {name}")
            continue
        numbers: tuple[Any, ...] = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers < oldest:
            wanted = ".".join(map(str, oldest))
            yield Finding(ERROR, f"{name} {version} is too old", f"pip install '{name}>={wanted}'")
        else:
            yield Finding(OK, f"{name} {version}")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
