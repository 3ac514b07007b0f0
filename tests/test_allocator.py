"""What a commit uses of memory stays with the process, and its next commit finds it there."""

import json
import os
import platform
import subprocess
import sys

import pytest

# Two commits to learn, and then what fresh memory the next ones touched: in a process without anything else in it.
CODE = """
import json, resource, sys
from promptdb import PromptDB
from promptdb.commits import PutRequest, SpanPayload
from promptdb.format import Group
from promptdb.keys import Root, pack_tokens

blob = bytes(9 << 20)
faults = []
with PromptDB(sys.argv[1], map_bytes=1 << 30) as db:
    for number in range(6):
        packed = pack_tokens([number, 1, 2, 3])
        spans = [
            SpanPayload(at, at + 1, (Group((0, 1), 1, 1, "F32"),), {"kv": blob}, 1.0, {}) for at in range(4)
        ]
        request = PutRequest(Root("a" * 64, "b" * 64), packed, 0, lambda position: spans[position:])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        (report,) = db.put_many([request])
        assert report.num_spans == 4
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have ways of their own")
@pytest.mark.parametrize(("environment", "is_kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_memory_of_a_commit_is_used_again(tmp_path, environment, is_kept):
    """36 MiB a commit are 9,216 pages. Who has set a threshold of their own keeps it."""
    command = [sys.executable, "-c", CODE, str(tmp_path / "store")]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    faults = json.loads(done.stdout)
    assert (max(faults[2:]) < 1000) == is_kept, faults
