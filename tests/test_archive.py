"""Archives: what goes out comes in again, whatever the cuts, through files and pipes, after kills, beside writers."""

import io
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from archive_tools import (
    MODEL,
    OTHER_MODEL,
    ROOT,
    ROOTS,
    TOKENIZER,
    archive_of,
    check_content,
    exported,
    frames_of,
    imported,
    lookup,
    num_logits,
    put,
    rewritten,
)
from cli_tools import command, run, run_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptdb import Engine, PromptDB
from promptdb.archive import BrokenArchiveError, Selection, export_nodes, import_archive
from promptdb.errors import NodeNotFoundError, StoreError
from promptdb.format import BLOBS, CHILDREN, pack_record
from promptdb.keys import Root, unpack_tokens
from promptdb.testing import encode_tokens

# Round trips

_PIECES = [(0,), (1,), (2**32 - 1,), (256,), (0, 1), (0,) * 7, (0,) * 20, (1,) * 13]
PROMPTS = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=5).map(lambda pieces: sum(pieces, ()))


@st.composite
def puts(draw):
    """A put with random cuts, and logits at random places."""
    tokens = draw(PROMPTS)
    return {
        "tokens": tokens,
        "root": draw(st.sampled_from(ROOTS)),
        "boundaries": draw(st.lists(st.integers(1, 40), max_size=3)),
        "logits": draw(st.lists(st.integers(1, len(tokens)), max_size=3)),
        "chunk_tokens": draw(st.sampled_from([1, 3, 16, 256])),
    }


def fill(db, some):
    for each in some:
        put(db, **each)


def shared(left, right):
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def expected(some, tokens, root):
    """Return how many tokens of a prompt are stored, by the list of what was put."""
    return max((shared(tokens, each["tokens"]) for each in some if each["root"] == root), default=0)


MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.data_too_large])


@MANY
@given(ours=st.lists(puts(), max_size=6), theirs=st.lists(puts(), max_size=4))
def test_everything_moves_into_any_store(ours, theirs):
    with PromptDB.in_memory(chunk_tokens=5) as source, PromptDB.in_memory(chunk_tokens=3) as target:
        fill(source, ours)
        fill(target, theirs)
        stored_before, logits_before = target.stat()["num_tokens"], num_logits(target)
        data = exported(source)
        report = imported(target, data)
        assert report.is_complete
        assert report.num_spans == source.stat()["num_nodes"]
        assert report.num_tokens == source.stat()["num_tokens"]
        assert report.num_logits == num_logits(source)
        assert report.tokens_stored == target.stat()["num_tokens"] - stored_before
        assert report.logits_stored == num_logits(target) - logits_before
        assert report.spans_stored + report.spans_present == report.num_spans
        assert report.spans_dropped == report.spans_filtered == 0
        for each in ours + theirs:
            tokens, root = each["tokens"], each["root"]
            assert check_content(target, tokens, root) == len(tokens)
            for position in each["logits"]:
                assert lookup(target, tokens[:position], root).has_logits
        assert target.verify() == []
        assert source.verify() == []
        again = imported(target, data)
        assert (again.spans_present, again.spans_stored, again.logits_stored) == (report.num_spans, 0, 0)
        assert target.verify() == []


@MANY
@given(ours=st.lists(puts(), min_size=1, max_size=6), number=st.integers(0), with_prefix=st.booleans())
def test_a_subtree_moves_with_and_without_what_it_stands_on(ours, number, with_prefix):
    with PromptDB.in_memory(chunk_tokens=5) as source, PromptDB.in_memory(chunk_tokens=3) as target:
        fill(source, ours)
        nodes = sorted(node for node, _ in source.nodes())
        node = nodes[number % len(nodes)]
        with source.read() as snapshot:
            record = snapshot.record(node)
            inside = dict(source.subtree(snapshot, node))
            path = snapshot.match(record.root, inside[node]).steps
        data = exported(source, Selection(node=node, with_prefix=with_prefix))
        report = imported(target, data)
        assert report.num_spans == len(inside) + (len(path) - 1 if with_prefix else 0)
        if not with_prefix and record.start:
            assert report.spans_dropped == report.num_spans
            assert target.stat()["num_nodes"] == 0
            imported(target, exported(source, Selection(node=path[-2].node)))
            assert imported(target, data).spans_dropped == 0
        for packed in inside.values():
            tokens = tuple(unpack_tokens(packed))
            assert check_content(target, tokens, record.root) == len(tokens)
            for position in range(record.start + 1, len(tokens) + 1):
                part = tokens[:position]
                assert lookup(target, part, record.root).has_logits == lookup(source, part, record.root).has_logits
        assert target.verify() == []


@MANY
@given(ours=st.lists(puts(), max_size=6), pick=st.sampled_from(["model", "namespace", "both"]))
def test_a_model_or_a_namespace_moves_alone(ours, pick):
    selection = {
        "model": Selection(weights_ids=frozenset([MODEL])),
        "namespace": Selection(namespace=""),
        "both": Selection(weights_ids=frozenset([MODEL]), namespace="tenant"),
    }[pick]
    with PromptDB.in_memory(chunk_tokens=5) as source, PromptDB.in_memory() as target:
        fill(source, ours)
        report = imported(target, exported(source, selection))
        assert {root for root, _ in target.roots()} == {root for root, _ in source.roots() if selection.wants(root)}
        assert report.num_spans == sum(totals["num_nodes"] for root, totals in source.roots() if selection.wants(root))
        for each in ours:
            wanted = expected(ours, each["tokens"], each["root"]) if selection.wants(each["root"]) else 0
            assert check_content(target, each["tokens"], each["root"]) == wanted
        # The same, chosen by the receiver.
        if pick == "model":
            with PromptDB.in_memory() as other:
                report = imported(other, exported(source), wants_model=MODEL.__eq__)
                assert list(other.nodes()) == [] or dict(other.roots()) == dict(target.roots())
                assert report.spans_filtered == source.stat()["num_nodes"] - other.stat()["num_nodes"]
                assert other.verify() == []


def test_another_namespace_is_another_trie():
    tokens = tuple(range(40))
    with PromptDB.in_memory(chunk_tokens=16) as source, PromptDB.in_memory() as target:
        put(source, tokens, logits=[40])
        imported(target, exported(source), namespace="tenant")
        moved = Root(MODEL, TOKENIZER, "tenant")
        assert [root for root, _ in target.roots()] == [moved]
        assert lookup(target, tokens).num_tokens == 0
        assert check_content(target, tokens, moved, content_root=ROOT) == 40
        assert lookup(target, tokens, moved).has_logits
        assert not {node for node, _ in target.nodes()} & {node for node, _ in source.nodes()}
        assert target.verify() == []


def test_only_what_has_a_tag():
    """Its spans from the start of each prompt on, and none that only stand beside or after them."""
    one, two, three = tuple(range(40)), (*range(24), 7, 8), (9, 9, 9)
    with PromptDB.in_memory(chunk_tokens=16) as source, PromptDB.in_memory() as target:
        for tokens in (one, two, three, (*two, *range(50))):
            put(source, tokens)
        put(source, three, root=ROOTS[1])
        source.tag("t", ROOT, two)
        source.tag("t", ROOTS[1], three)
        source.tag("other", ROOT, three)
        report = imported(target, exported(source, Selection(tag="t")))
        assert report.spans_stored == target.stat()["num_nodes"] == len(source.tagged("t"))
        assert lookup(target, two).num_tokens == 26
        assert lookup(target, one).num_tokens == 32  # whose second span `two` leaves at 24
        assert lookup(target, three).num_tokens == 0
        assert lookup(target, three, ROOTS[1]).num_tokens == 3
        assert target.verify() == []
        assert imported(target, exported(source, Selection(tag="nobody's"))).spans_stored == 0


def test_namespaces_never_become_one():
    with PromptDB.in_memory() as source, PromptDB.in_memory() as target:
        for number in range(300):  # more than one batch of the first namespace
            put(source, [number])
        put(source, range(5), root=ROOTS[1])
        with pytest.raises(StoreError, match="several namespaces"):
            imported(target, exported(source), namespace="new")
        assert target.stat()["num_nodes"] == 0
        # An archive that lies about their number gets no further than the first.
        lying = rewritten(exported(source), manifest={"num_namespaces": 1})
        with pytest.raises(StoreError, match="several namespaces"):
            imported(target, lying, namespace="new")
        assert [root.namespace for root, _ in target.roots()] == ["new"]
        assert lookup(target, range(5), Root(MODEL, TOKENIZER, "new")).num_tokens <= 1


def test_a_deep_and_a_wide_tree_on_disk(db, tmp_path):
    """Branches at every position of a long span, 300 prompts from one place, and 1,500 spans in a row."""
    long = tuple(range(300))
    put(db, long, chunk_tokens=256)
    for position in range(0, 300, 7):
        put(db, (*long[:position], 7_000_000, position))
    for number in range(300):
        put(db, (1, 2, number + 10))
    chain = tuple(range(9_000, 10_500))
    put(db, chain, chunk_tokens=1)
    with PromptDB(tmp_path / "other", chunk_tokens=7) as other:
        report = imported(other, exported(db))
        assert report.spans_stored == db.stat()["num_nodes"]
        assert other.stat()["num_nodes"] == db.stat()["num_nodes"]
        assert other.stat()["blob_bytes"] == db.stat()["blob_bytes"] == report.bytes_stored
        for tokens in (long, chain, (1, 2, 300), (*long[:14], 7_000_000, 14)):
            assert check_content(other, tokens) == len(tokens)
        assert {node for node, _ in other.nodes()} == {node for node, _ in db.nodes()}
        assert other.verify() == []


# Files and pipes

TIMEOUT_S = 120


@pytest.fixture
def filled(tmp_path):
    """A store on disk with a tree, and its prompts."""
    prompts = [(*range(number), 1_000 + number, *range(30)) for number in range(0, 40, 3)]
    with PromptDB(tmp_path / "filled", chunk_tokens=8) as db:
        for tokens in prompts:
            put(db, tokens, logits=[len(tokens)])
        yield db, prompts


def check_same(db, prompts):
    assert [check_content(db, tokens) for tokens in prompts] == [len(tokens) for tokens in prompts]
    assert all(lookup(db, tokens).has_logits for tokens in prompts)
    assert db.verify() == []


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


def environment():
    """Return the environment of a child that imports what the tests share."""
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}


# What is damaged, gone or odd in the store


def tamper(db, table, change, number=0):
    """Change an item of a table behind the store's back."""

    def work(writer):
        key, value = list(writer.scan(table))[number]
        change(writer, key, bytes(value))

    db._index.transact(work)


def flip_last(table):
    return lambda writer, key, value: writer.put(table, key, value[:-1] + bytes([value[-1] ^ 1]))


def test_damaged_spans_are_left_out(filled):
    db, prompts = filled
    for number in 5, 20:
        tamper(db, BLOBS, flip_last(BLOBS), number)
    report_bytes = io.BytesIO()
    report = export_nodes(db, Selection(), report_bytes)
    assert 1 <= report.num_damaged <= 2
    with PromptDB.in_memory() as other:
        assert imported(other, report_bytes.getvalue()).spans_stored == report.num_spans
        for tokens in prompts:
            check_content(other, tokens)
        assert 0 < other.stat()["num_nodes"] < db.stat()["num_nodes"]
        assert other.verify() == []


def test_numbers_that_no_model_gave_do_not_leave_the_store():
    """What an import would refuse, an export leaves out."""
    with PromptDB.in_memory() as db:
        put(db, range(4))
        packed = bytes(range(4)) * 4
        db.put(ROOT, packed, 0, encode_tokens(packed))  # neither keys nor values
        stream = io.BytesIO()
        report = export_nodes(db, Selection(), stream)
        assert (report.num_spans, report.num_damaged) == (1, 1)
        with PromptDB.in_memory() as other:
            assert imported(other, stream.getvalue()).spans_stored == 1


def test_a_span_that_cannot_be_reached(filled):
    db, prompts = filled
    with db.read() as snapshot:
        steps = snapshot.match(ROOT, lookup(db, prompts[-1]).packed).steps
    db.remove(steps[1].node, only=True)
    with pytest.raises(NodeNotFoundError, match="removed"):
        exported(db, Selection(node=steps[2].node))
    with pytest.raises(NodeNotFoundError, match="no node"):
        exported(db, Selection(node=bytes(32)))
    with PromptDB.in_memory() as other:
        imported(other, exported(db))
        assert lookup(other, prompts[-1]).num_tokens == lookup(db, prompts[-1]).num_tokens == steps[1].start
    put(db, prompts[-1])
    with PromptDB.in_memory() as other:
        imported(other, exported(db, Selection(node=steps[2].node)))
        assert lookup(other, prompts[-1]).num_tokens == len(prompts[-1])


def test_a_damaged_store_is_not_called_a_damaged_archive(filled):
    db, _ = filled
    data = exported(db)
    tamper(db, CHILDREN, lambda writer, key, value: writer.put(CHILDREN, key, value[:-1]))
    with pytest.raises(StoreError, match="the store is damaged") as raised:
        imported(db, data)
    assert "verify --fix" in raised.value.hint


def test_a_store_that_cannot_be_written(filled, tmp_path):
    db, _ = filled
    data = exported(db)
    PromptDB(tmp_path / "other").close()
    with (
        PromptDB(tmp_path / "other", readonly=True) as other,
        pytest.raises(StoreError, match="reading only") as raised,
    ):
        imported(other, data)
    assert "0 spans are stored" in raised.value.hint


# The registry


def test_only_what_describes_a_model_moves():
    described = {"model_type": "llama", "name": "m", "num_layers": 2, "dtype": "float32", "max_tokens": 9}
    measured = {"compute_tokens_per_s": 1.0, "probed_with": "everything", "exact_ways": "packed"}
    with PromptDB.in_memory() as source, PromptDB.in_memory() as target:
        put(source, range(4))
        source.registry.add_model(MODEL, described | measured)
        source.registry.add_model(OTHER_MODEL, described)
        data = exported(source)
        assert imported(target, data).models_stored == 1
        found = target.registry.models()
        assert set(found) == {MODEL}
        assert {name: value for name, value in found[MODEL].items() if name != "first_seen_unix_s"} == described
        assert imported(target, data).models_stored == 0
    with PromptDB.in_memory() as target:  # what the store knows stays
        target.registry.add_model(MODEL, {"name": "mine"} | measured)
        assert imported(target, data).models_stored == 0
        assert target.registry.model(MODEL)["name"] == "mine"
        assert target.registry.model(MODEL)["exact_ways"] == "packed"


@pytest.mark.parametrize(
    "fields", [{"name": "\x1b]0;x\x07"}, {"name": 7}, {"num_layers": -1}, {"max_tokens": "9"}, {"num_layers": True}]
)
def test_descriptions_that_cannot_be(fields):
    key = bytes.fromhex(MODEL)
    with PromptDB.in_memory() as source, PromptDB.in_memory() as target:
        put(source, range(4))
        frames = frames_of(exported(source))
        frames.insert(1, (b"MODL", key + pack_record(key, fields)))
        with pytest.raises(BrokenArchiveError, match="description of a model"):
            imported(target, archive_of(frames))
        assert target.registry.models() == {}


def test_a_tokenizer_must_give_the_id_that_it_claims(tokenizer):
    from promptdb.tokenizer_identity import tokenizer_id
    from promptdb.tokens import Encoder

    bare = tokenizer.backend_tokenizer
    known = tokenizer_id(bare)
    fields = {**Encoder(bare).registry_fields(), "name": "Tokenizer"}
    root = Root(MODEL, known)
    with PromptDB.in_memory() as source:
        put(source, range(4), root=root)
        source.registry.add_tokenizer(known, fields)
        data = exported(source)
    with PromptDB.in_memory() as target:
        assert imported(target, data).tokenizers_stored == 1
        assert target.registry.tokenizer(known) == fields
        assert Encoder.from_registry(target.registry.tokenizer(known)).encode("Hello").packed
    forged = {
        "another ID": (TOKENIZER, fields),
        "another vocabulary": (known, fields | {"json": fields["json"].replace('"H"', '"HH"')}),
        "another flag": (known, fields | {"encode_special_tokens": not fields["encode_special_tokens"]}),
        "no JSON": (known, fields | {"json": "{" * 1000}),
        "no tokenizer": (known, fields | {"json": "{}"}),
        "another type": (known, fields | {"json": 7}),
        "a name that steers a terminal": (known, fields | {"name": "\x1b[2J"}),
    }
    assert forged["another vocabulary"][1]["json"] != fields["json"]
    for what, (identity, claimed) in forged.items():
        key = bytes.fromhex(identity)
        frames = [frame for frame in frames_of(data) if frame[0] != b"TOKN"]
        frames.insert(1, (b"TOKN", key + pack_record(key, claimed)))
        with PromptDB.in_memory() as target:
            report = imported(target, archive_of(frames))
            assert (report.tokenizers_stored, report.tokenizers_unchecked) == (0, 1), what
            assert target.registry.tokenizers() == {}


def test_what_an_engine_stored_is_used_after_it_moved(tmp_path, tokenizer):
    """End to end: a model's representations, moved, give what the model computes."""
    import torch

    from promptdb.demo_models import random_model

    model = random_model("llama")
    text = "Hello there. General Kenobi, you are a bold one."
    with PromptDB(tmp_path / "a", chunk_tokens=7) as db, Engine(db, model, tokenizer) as engine:
        computed = engine.get([text[:20], text[20:]])
        engine.flush()
        data = exported(db)
    with PromptDB(tmp_path / "b", chunk_tokens=16) as db:
        assert imported(db, data).is_complete
        with Engine(db, model, tokenizer) as engine:
            loaded = engine.get(text)
            assert loaded.tokens_computed == 0
            assert torch.equal(loaded.logits, computed.logits)
            assert torch.equal(loaded.token_logprobs, computed.token_logprobs)
            longer = engine.get(text + " And then?")
            assert longer.tokens_loaded == loaded.tokens_loaded
        ids = torch.tensor([longer.token_ids])
        with torch.no_grad():
            plain = model(ids).logits[0, -1]
        torch.testing.assert_close(longer.logits, plain, atol=1e-5, rtol=1e-5)
        # Another model finds nothing, whatever the archive held.
        with Engine(db, random_model("llama", seed=5), tokenizer) as engine:
            assert engine.lookup(text).num_tokens == 0


# Kills and races

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


def num_spans(path):
    try:
        with PromptDB(path, readonly=True) as db:
            return db.stat()["num_nodes"]
    except StoreError:  # not there yet
        return 0


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


# The command line


@pytest.fixture
def store(filled, tmp_path):
    filled[0].close()
    return tmp_path / "filled"


def test_commands_move_everything(store, filled, tmp_path):
    _, prompts = filled
    file = tmp_path / "out.archive"
    written = run_json("export", "--db", store, file)
    assert written["num_spans"] > 0
    assert written["num_bytes"] == file.stat().st_size
    assert run("export", "--db", store, file, code=None).exit_code == 2
    shown = run("export", "--db", store, "--force", file).stdout
    assert f"{written['num_spans']:,} spans" in shown
    assert run_json("check", file)["num_spans"] == written["num_spans"]
    found = run_json("import", "--db", tmp_path / "other", file)
    assert found["spans_stored"] == written["num_spans"]
    shown = run("import", "--db", tmp_path / "other", file).stdout
    assert f"{written['num_spans']:,} spans there already" in shown
    with PromptDB(tmp_path / "other") as other:
        check_same(other, prompts)


def test_commands_move_through_a_pipe(store, filled, tmp_path):
    _, prompts = filled
    exporting = subprocess.Popen(
        [*command(), "export", "--db", str(store), "-", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    importing = subprocess.run(
        [*command(), "import", "--db", str(tmp_path / "other"), "-"],
        stdin=exporting.stdout, capture_output=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert importing.returncode == 0, importing.stderr
    assert b'"num_spans"' in exporting.stderr.read()
    assert exporting.wait() == 0
    with PromptDB(tmp_path / "other") as other:
        check_same(other, prompts)


def test_a_reader_that_goes_away(store):
    # More than a pipe holds.
    with PromptDB(store) as db:
        for number in range(200):
            put(db, (5000 + number, *range(60)))
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -c 100 | wc -c; echo ${PIPESTATUS[0]}', "bash",
         *command(), "export", "--db", str(store), "-"],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.stdout.split() == ["100", "141"], done.stderr
    assert "Traceback" not in done.stderr


def test_commands_choose(tmp_path):
    with PromptDB(tmp_path / "a", chunk_tokens=4) as db:
        for root in ROOTS:
            put(db, range(8), root=root)
            put(db, [*range(4), 9, 9], root=root)
        db.registry.add_model(MODEL, {"name": "first"})
        db.registry.add_model(OTHER_MODEL, {"name": "second"})
        node = lookup(db, range(8)).steps[1].node.hex()
    store, file = tmp_path / "a", tmp_path / "out.archive"

    def moved(*arguments, code=0, importing=()):
        number = len(list(tmp_path.glob("to*")))
        written = run_json("export", "--db", store, "--force", file, *arguments)
        found = run_json("import", "--db", tmp_path / f"to{number}", file, *importing, code=code)
        assert written["num_spans"] == found["num_spans"]
        with PromptDB(tmp_path / f"to{number}") as db:
            assert db.verify() == []
            return {(root.weights_id, root.namespace): totals["num_nodes"] for root, totals in db.roots()}

    assert moved() == {(MODEL, ""): 3, (MODEL, "tenant"): 3, (OTHER_MODEL, ""): 3}
    assert moved("--model", "first") == {(MODEL, ""): 3, (MODEL, "tenant"): 3}
    assert moved("--model", "cccc", "--namespace", "") == {(OTHER_MODEL, ""): 3}
    assert moved("--namespace", "tenant") == {(MODEL, "tenant"): 3}
    assert moved(node[:12]) == {(MODEL, ""): 2}
    assert moved(node, "--without-prefix", code=1) == {}
    assert moved(importing=["--only-model", "cccc"]) == {(OTHER_MODEL, ""): 3}
    assert moved(importing=["--only-model", "dddd"], code=1) == {}
    assert moved(importing=["--only-tokenizer", TOKENIZER]) == moved()
    assert moved("--namespace", "", "--model", "first", importing=["--namespace", "new"]) == {(MODEL, "new"): 3}
    run("export", "--db", store, "--force", file)
    found = run_json("import", "--db", tmp_path / "to0", file, "--only-model", "second")  # a name that this store knows
    assert (found["spans_present"], found["spans_filtered"]) == (3, 6)
    shown = run("import", "--db", tmp_path / "to9", file, "--only-model", "nobody", code=1)
    assert "promptdb check" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "FILE", "--without-prefix"], "goes with NODE"),
        (["export", "FILE", "abcd", "--model", "m"], "NODE is one span"),
        (["export", "FILE", "xyz"], "no node ID"),
        (["export", "FILE", "0" * 64], "no node ID starts"),
        (["export", "FILE", "--model", "nobody"], "knows no model"),
        (["export", "."], "directory"),
        (["import", "FILE"], "cannot be read"),
        (["import", "FILE", "--max-blob-bytes", "0"], "max-blob-bytes"),
        (["import", "DAMAGED", "--only-tokenizer", "x"], "no tokenizer ID"),
        (["check", "FILE"], "cannot be read"),
        (["check", "."], "no store at"),
        (["import", "TEXT"], "no promptdb archive"),
        (["check", "TEXT"], "no promptdb archive"),
    ],
)
def test_wrong_usage_says_what_to_do(store, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("TEXT").write_text("hello")
    Path("DAMAGED").write_bytes(exported(PromptDB.in_memory()))
    options = [] if arguments[0] == "check" else ["--db", store if arguments[0] == "export" else tmp_path / "new"]
    result = run(*arguments, *options, code=None)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Hint:" in result.stderr or "Usage:" in result.stderr
    if arguments[:2] == ["import", "TEXT"]:
        assert not (tmp_path / "new").exists()  # nothing is created for what is no archive


def test_a_broken_archive_says_how_much_is_in(store, filled, tmp_path):
    _, prompts = filled
    file = tmp_path / "out.archive"
    total = run_json("export", "--db", store, file)["num_spans"]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result = run("import", "--db", tmp_path / "other", file, code=2)
    with PromptDB(tmp_path / "other") as other:
        stored = other.stat()["num_nodes"]
        for tokens in prompts:
            check_content(other, tokens)
    assert 0 < stored < total
    assert f"after {stored:,} spans" in result.stderr
    assert f"{stored:,} spans are stored, all of them verified" in result.stderr
    found = run_json("import", "--db", tmp_path / "other", file, code=2)
    assert not found["is_complete"]
    assert found["spans_present"] == stored
    found = run_json("check", file, code=1)
    assert not found["is_sound"]
    assert "ends in the middle" in found["problem"]
    assert "ends in the middle" in run("check", file, code=1).stdout


def test_an_export_with_damage_has_another_exit_code(store, tmp_path):
    with PromptDB(store) as db:
        tamper(db, BLOBS, flip_last(BLOBS))
    found = run_json("export", "--db", store, tmp_path / "out.archive", code=1)
    assert found["num_damaged"] == 1
    assert "verify --fix" in run("export", "--db", store, "--force", tmp_path / "out.archive", code=1).stdout


def test_an_empty_store(tmp_path):
    PromptDB(tmp_path / "empty").close()
    assert run_json("export", "--db", tmp_path / "empty", tmp_path / "x", code=1)["num_spans"] == 0
    assert run_json("import", "--db", tmp_path / "other", tmp_path / "x")["is_complete"]


def test_names_are_any_unicode(tmp_path):
    root = Root(MODEL, TOKENIZER, "Ünïcode 🙂 \x1b[2J\n")
    with PromptDB(tmp_path / "a") as db:
        put(db, range(5), root=root)
    file = tmp_path / "ärchiv 🙂.promptdb"
    run("export", "--db", tmp_path / "a", "--namespace", root.namespace, file)
    run("import", "--db", tmp_path / "b", file)
    with PromptDB(tmp_path / "b") as db:
        assert check_content(db, range(5), root) == 5


def test_moving_needs_no_heavy_library(store, tmp_path):
    code = f"""
import sys
from promptdb.cli.main import cli
for arguments in (["export", "--db", {str(store)!r}, {str(tmp_path / "x")!r}], ["check", {str(tmp_path / "x")!r}],
                  ["import", "--db", {str(tmp_path / "y")!r}, {str(tmp_path / "x")!r}]):
    assert not cli.main(arguments, standalone_mode=False), arguments
    heavy = {{"torch", "transformers", "numpy", "rich", "tokenizers"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE)
