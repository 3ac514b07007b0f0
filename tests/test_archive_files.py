"""Archives in files and pipes: whole or not at all, a little at a time, in little memory."""

import io
import os
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from archive_tools import (
    TIMEOUT_S,
    check_same,
    environment,
    exported,
)

from promptdb import PromptDB
from promptdb.archive import Selection, export_nodes, import_archive
from promptdb.errors import StoreError


def test_a_file_appears_whole_and_private(filled, tmp_path):
    db, prompts = filled
    file = tmp_path / "out.archive"
    before = os.umask(0)
    try:
        seen = []
        report = export_nodes(db, Selection(), file, progress=lambda done: seen.append((file.exists(), done)))
    finally:
        os.umask(before)
    assert not any(exists for exists, _ in seen)
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_size == report.num_bytes
    assert {entry.name for entry in tmp_path.iterdir()} == {"filled", file.name}
    with pytest.raises(StoreError, match="is there already"):
        export_nodes(db, Selection(), file)
    export_nodes(db, Selection(), file, overwrite=True)
    with PromptDB(tmp_path / "other") as other:
        import_archive(other, file)
        check_same(other, prompts)


def test_an_export_that_fails_leaves_nothing(filled, tmp_path):
    db, _ = filled
    file = tmp_path / "out.archive"
    file.write_bytes(b"precious")

    def stop(done):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        export_nodes(db, Selection(), file, overwrite=True, progress=stop)
    assert file.read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.part"))


def test_two_exports_to_one_file(filled, tmp_path):
    """The second is refused while the first is writing, and what a killed one left is replaced."""
    db, prompts = filled
    file = tmp_path / "out.archive"
    Path(f"{file}.part").write_bytes(b"x" * 1_000_000)
    refused = []

    def second(done):
        if not refused:
            with pytest.raises(StoreError, match="another export is writing"):
                export_nodes(db, Selection(), file)
            refused.append(done)

    export_nodes(db, Selection(), file, progress=second)
    assert refused
    with PromptDB.in_memory() as other:
        import_archive(other, file)
        check_same(other, prompts)


@pytest.mark.parametrize("make", ["directory", "link", "pipe", "no directory", "denied", "nul", "empty"])
def test_places_that_cannot_be_written(filled, tmp_path, make):
    db, _ = filled
    file = tmp_path / "out.archive"
    if make == "directory":
        file.mkdir()
    elif make == "link":  # somebody else's trap
        (tmp_path / "out.archive.part").symlink_to(tmp_path / "victim")
    elif make == "pipe":
        os.mkfifo(tmp_path / "out.archive.part")
    elif make == "no directory":
        file = tmp_path / "missing" / "out.archive"
    elif make == "denied":
        file = Path("/proc/out.archive")
    with pytest.raises(StoreError) as raised:
        export_nodes(db, Selection(), {"nul": "a\0b", "empty": ""}.get(make, file), overwrite=True)
    assert raised.value.hint
    assert not (tmp_path / "victim").exists()


def test_a_full_disk_is_told(filled):
    db, _ = filled
    with pytest.raises(StoreError, match="No space left"):
        export_nodes(db, Selection(), "/dev/full")


@pytest.mark.parametrize("file", ["missing", ".", "a\0b"])
def test_files_that_cannot_be_read(tmp_path, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with PromptDB.in_memory() as db, pytest.raises(StoreError) as raised:
        import_archive(db, file)
    assert "read" in raised.value.message or "path" in raised.value.message


class Trickle(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data):
        self._stream, self._random = io.BytesIO(data), random.Random(0)

    def readinto(self, buffer):
        return self._stream.readinto(buffer[: self._random.randrange(1, 40)])


def test_a_pipe_that_gives_a_little_at_a_time(filled):
    db, prompts = filled
    with PromptDB.in_memory() as other:
        assert import_archive(other, Trickle(exported(db))).is_complete
        check_same(other, prompts)


def test_through_a_named_pipe(filled, tmp_path):
    db, prompts = filled
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with PromptDB.in_memory() as other:
        reading = threading.Thread(target=import_archive, args=(other, pipe))
        reading.start()
        export_nodes(db, Selection(), pipe)
        reading.join(TIMEOUT_S)
        check_same(other, prompts)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_memory_is_that_of_a_span_not_of_the_archive(tmp_path):
    """60 MB of spans go out and in with less than 50 MB more than before."""
    script = """
import resource, sys
from archive_tools import ROOT
from promptdb import PromptDB
from promptdb.archive import Selection, export_nodes, import_archive
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.format import Group
from promptdb.keys import pack_tokens

where = sys.argv[1]
layout = (Group((0, 1), 4, 256, "F32"),)
lp = build_blob([(TensorSpec("token_logprobs", "F32", (64,)), bytes(256))])
kv = build_blob([(TensorSpec("kv.0", "F32", layout[0].span_shape(64)), bytes(64 * 8 * 1024))])
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with PromptDB(where + "/a", chunk_tokens=64) as db:
    for number in range(120):
        payload = SpanPayload(0, 64, layout, {"kv": kv, "lp": lp}, 0.1, {})
        db.put(ROOT, pack_tokens([number, *range(63)]), 0, lambda _: [payload])
# The map counts as memory of whoever looks at it, but it is the system's to take back.
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
before, peak = anonymous(), 0
def watch(done):
    global peak
    peak = max(peak, anonymous())
with PromptDB(where + "/a") as db:
    size = export_nodes(db, Selection(), where + "/x", progress=watch).num_bytes
with PromptDB(where + "/b") as db:
    assert import_archive(db, where + "/x", progress=watch).spans_stored == 120
assert size > 60_000_000
print(peak - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True, env=environment(),
    )  # fmt: skip
    assert int(done.stdout) < 50_000_000
