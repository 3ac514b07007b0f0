"""Telling local from network filesystems by the kernel's mount table."""

from pathlib import Path

import pytest

from promptdb.errors import RemoteFilesystemError, StoreError
from promptdb.filesystem import filesystem_type, refuse_remote

LINES = b"""\
22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /mnt rw - tmpfs tmpfs rw
24 23 0:22 / /mnt/nfs rw shared:2 master:3 - nfs4 server:/export rw
25 24 0:23 / /mnt/nfs/local rw - xfs /dev/sdb rw
26 22 0:24 / /mnt/with\\040space rw - cifs //server/share rw
27 22 0:25 / /mnt/\xff\xfe rw - ext4 /dev/sdc rw
28 22 0:26 / /mnt/covered rw - ext4 /dev/sdd rw
29 28 0:27 / /mnt/covered rw - fuse.sshfs host: rw
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "mountinfo"
    path.write_bytes(LINES)
    return path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/mnt/x", "tmpfs"),
        ("/mnt/nfs", "nfs4"),
        ("/mnt/nfs/store/deep", "nfs4"),
        ("/mnt/nfs/local/x", "xfs"),
        ("/mnt/nfsx", "tmpfs"),
        ("/mnt/with space/x", "cifs"),
        ("/mnt/covered/x", "fuse.sshfs"),
    ],
)
def test_the_innermost_last_mount_counts(table, path, kind):
    assert filesystem_type(Path(path), table) == kind


def test_no_mount_table(tmp_path):
    assert filesystem_type(Path("/"), tmp_path / "missing") == ""
    refuse_remote(Path("/mnt/nfs"), tmp_path / "missing")


def test_remote_is_refused_with_a_hint(table):
    refuse_remote(Path("/mnt/nfs/local"), table)
    with pytest.raises(RemoteFilesystemError, match=r"nfs4.*local disk") as caught:
        refuse_remote(Path("/mnt/nfs/store"), table)
    assert isinstance(caught.value, StoreError)
