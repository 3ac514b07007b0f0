"""Archives beside other processes: after kills, beside writers, two at once."""

import io
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from archive_tools import (
    TIMEOUT_S,
    check_content,
    check_same,
    environment,
    imported,
    num_spans,
    put,
)

from promptdb import PromptDB
from promptdb.archive import Selection, export_nodes, import_archive

CHILD = """
import sys
from promptdb import PromptDB
from promptdb.archive import Selection, export_nodes, import_archive
what, store, file = sys.argv[1:]
with PromptDB(store) as db:
    print("ready", flush=True)
    if what == "import":
        import_archive(db, file)
    else:
        export_nodes(db, Selection(), file, overwrite=True)
print("done", flush=True)
"""


def child(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def kill_after(process, seconds):
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return process.communicate(timeout=TIMEOUT_S)[0] == "done\n"


def kill_when(process, happened):
    assert process.stdout.readline() == "ready\n"
    while process.poll() is None and not happened():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def many(tmp_path):
    """A store with a thousand spans: an import takes a second or so."""
    prompts = [(number, *range(number % 17), *range(60)) for number in range(150)]
    with PromptDB(tmp_path / "many", chunk_tokens=8) as db:
        for tokens in prompts:
            put(db, tokens, logits=[len(tokens)])
        yield db, prompts


def test_imports_that_are_killed_go_on(many, tmp_path):
    db, prompts = many
    file = tmp_path / "out.archive"
    spans = export_nodes(db, Selection(), file).num_spans
    source = random.Random(1)
    stored, was_partial = 0, 0
    for number in range(8):
        process = child("import", tmp_path / "other", file)
        if number % 2:  # when a transaction is through, whatever that takes here
            kill_when(process, lambda before=stored: num_spans(tmp_path / "other") > before)
        else:
            kill_after(process, source.uniform(0, 0.6))
        with PromptDB(tmp_path / "other") as other:
            assert other.verify() == []
            assert stored <= other.stat()["num_nodes"] <= spans
            stored = other.stat()["num_nodes"]
            was_partial += 0 < stored < spans
    assert was_partial, "no kill came in the middle"
    with PromptDB(tmp_path / "other") as other:
        report = import_archive(other, file)
        assert report.spans_present >= stored
        assert report.spans_stored == spans - stored
        check_same(other, prompts)


def test_exports_that_are_killed_leave_no_file(many, tmp_path):
    db, prompts = many
    file = tmp_path / "out.archive"
    source = random.Random(2)
    for _ in range(8):
        if kill_after(child("export", tmp_path / "many", file), source.uniform(0, 0.5)):
            continue
        if file.exists():  # the one before it finished
            with PromptDB.in_memory() as other:
                assert import_archive(other, file).is_complete
    export_nodes(db, Selection(), file, overwrite=True)
    with PromptDB(tmp_path / "other") as other:
        import_archive(other, file)
        check_same(other, prompts)
    assert not Path(f"{file}.part").exists()


WRITER = """
import random, sys
sys.path.insert(0, sys.argv[2])
from archive_tools import ROOT, put
from promptdb import PromptDB
from promptdb.errors import NodeNotFoundError
source = random.Random(3)
with PromptDB(sys.argv[1]) as db:
    print("ready", flush=True)
    while True:
        number = source.randrange(150)
        put(db, (number, *range(number % 17), *range(60)), boundaries=[source.randrange(60)], logits=[60])
        nodes = [node for node, _ in db.nodes()]
        try:
            db.remove(source.choice(nodes), only=source.random() < 0.2)
        except NodeNotFoundError:
            pass
"""


def test_export_while_another_process_writes_and_removes(many, tmp_path):
    """Whatever is in the archive stands on what is in it, and is what belongs there."""
    db, prompts = many
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "many"), str(Path(__file__).parent)],
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert writer.stdout.readline() == "ready\n"
        for _ in range(3):
            with PromptDB.in_memory() as other:
                stream = io.BytesIO()
                report = export_nodes(db, Selection(), stream)
                assert report.num_damaged == 0
                found = imported(other, stream.getvalue())
                assert found.spans_dropped == 0
                assert found.num_spans == report.num_spans > 100
                for tokens in prompts[::20]:
                    check_content(other, tokens)
                assert other.verify() == []
    finally:
        writer.kill()
        writer.wait()
    with PromptDB(tmp_path / "many") as again:
        assert again.verify() == []


def test_two_imports_at_once(many, tmp_path):
    db, prompts = many
    file = tmp_path / "out.archive"
    export_nodes(db, Selection(), file)
    children = [child("import", tmp_path / "other", file) for _ in range(2)]
    assert all(each.communicate(timeout=TIMEOUT_S)[0].endswith("done\n") for each in children)
    with PromptDB(tmp_path / "other") as other:
        assert other.stat()["num_nodes"] == db.stat()["num_nodes"]
        check_same(other, prompts)
