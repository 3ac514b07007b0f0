"""Which filesystem a path is on: LMDB's locks and map do not hold across a network. And making names durable."""

from __future__ import annotations

import os
import re
from pathlib import Path

from promptdb.errors import RemoteFilesystemError

REMOTE_TYPES = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fuse.cephfs", "fuse.gcsfuse", "fuse.glusterfs",
        "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
        "ocfs2", "orangefs", "smb2", "smb3", "smbfs", "wekafs",
    }
)  # fmt: skip

_OCTAL = re.compile(r"\\([0-7]{3})")  # how the kernel writes a space, a tab, a newline and a backslash

MOUNT_TABLE = Path("/proc/self/mountinfo")


def filesystem_type(path: Path, mount_table: Path = MOUNT_TABLE) -> str:
    """Return the type of the filesystem that ``path`` is on, as the kernel names it; empty where it cannot be told."""
    try:
        lines = mount_table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""  # not Linux
    resolved = path.resolve()
    best, best_type = -1, ""
    for line in lines:
        # ID parent major:minor root MOUNT-POINT options [optional fields] - TYPE source super-options
        fields, _, tail = line.partition(" - ")
        mount_point = Path(_OCTAL.sub(lambda code: chr(int(code[1], 8)), fields.split()[4]))
        # The last of several mounts on one point is the one that shows.
        if resolved.is_relative_to(mount_point) and len(mount_point.parts) >= best:
            best, best_type = len(mount_point.parts), tail.split()[0]
    return best_type


def refuse_remote(path: Path, mount_table: Path = MOUNT_TABLE) -> None:
    """Raise :class:`RemoteFilesystemError` if ``path`` is on a network filesystem."""
    kind = filesystem_type(path, mount_table)
    if kind in REMOTE_TYPES:
        raise RemoteFilesystemError(
            f"{path} is on a network filesystem ({kind}), where LMDB loses or corrupts data",
            "put the store on a local disk",
        )


def sync_directory(directory: Path) -> None:
    """Make names that were given in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
