"""Artifacts: what is saved is what is loaded, whatever happens to the store; damage is never a result."""

from __future__ import annotations

import base64
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors import numpy as safetensors_numpy

from promptdb import PromptDB
from promptdb.artifact_records import blob_key, record_key
from promptdb.backup import backup
from promptdb.errors import CorruptDataError, InputTypeError, NodeNotFoundError, ReadOnlyStoreError, StoreError
from promptdb.format import ARTIFACTS, pack_record, unpack_record
from promptdb.keys import Root, pack_tokens
from promptdb.testing import encode_tokens

KEY = "ab" * 32
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
    "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip


def tensors():
    generator = torch.Generator().manual_seed(0)
    found = {name: (torch.randn(3, 4, generator=generator) * 9).abs().to(getattr(torch, name)) for name in DTYPES}
    found |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "strided": torch.arange(12.0).view(3, 4).T}
    found["ключ/🙂 t"] = torch.tensor([1], dtype=torch.int8)
    return found


COLUMNS = {
    "step": [1, 2, -(2**63)],
    "loss": [0.5, math.inf, 2],
    "done": [True, False, True],
    "text": ["", "naïve 你好\n", "🙂"],
}
CONFIG = {"lr": 1e-3, "steps": 10**40, "name": "é", "nested": {"a": [1, None, True, {"b": []}]}}


def fill(db, name="probe/1", **options):
    given = {"tensors": tensors(), "columns": COLUMNS, "config": CONFIG, "notes": "two\nlines: é"}
    return db.artifacts.save(name, **given, plot={"kind": "line", "y": "loss"}, **options)


def check(found, name="probe/1"):
    assert (found.name, found.config, found.notes) == (name, CONFIG, "two\nlines: é")
    assert found.plot.as_fields() == {"kind": "line", "y": ["loss"]}
    assert found.columns == COLUMNS
    assert [type(value) for value in found.columns["loss"]] == [float] * 3
    assert list(found.tensors) == list(tensors())
    for each, tensor in tensors().items():
        got = found.tensors[each]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert raw(got) == raw(tensor)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"key": KEY}, {"compression": "zstd", "key": KEY}])
def test_what_is_saved_is_loaded_by_another_process(store_path, options):
    with PromptDB(store_path, **options) as db:
        check(fill(db))
        check(db.artifacts.load("probe/1"))
    with PromptDB(store_path, readonly=True, key=options.get("key")) as db:
        check(db.artifacts.load("probe/1"))
        assert db.verify() == []
        stat = db.stat()
        assert (stat["num_artifacts"], stat["charged_bytes"]) == (1, 0)
        assert stat["artifact_bytes"] > 500
    content = (store_path / "data.mdb").read_bytes()
    assert (b"two\nlines" in content) == (b"probe/1" in content) == ("key" not in options)


def test_a_store_in_memory_has_them_too():
    with PromptDB.in_memory() as db:
        check(fill(db))
        check(db.artifacts.load("probe/1"))
        assert db.verify() == []


def test_compression_is_the_stores_own(store_path):
    numbers = torch.randint(256, (1 << 16,), generator=torch.Generator().manual_seed(0))
    with PromptDB(store_path) as db:
        db.artifacts.save("plain", tensors={"x": numbers})
        db.set_compression("zstd")
        db.artifacts.save("packed", tensors={"x": numbers})
        plain, packed = db.artifacts.find("plain"), db.artifacts.find("packed")
        assert packed.blob_bytes < plain.blob_bytes / 4
        assert torch.equal(db.artifacts.load("plain").tensors["x"], db.artifacts.load("packed").tensors["x"])
        assert db.verify() == []


def test_arrays_of_numpy(db):
    arrays = {
        "big-endian": np.arange(6, dtype=">f4").reshape(2, 3),
        "strided": np.arange(12, dtype=np.int16)[::2],
        "scalar": np.float64(3.5),
        "bool": np.array([True, False]),
    }
    db.artifacts.save("a", tensors=arrays, columns={"n": np.arange(3), "x": np.ones(3, dtype=np.float32)})
    found = db.artifacts.load("a")
    for name, array in arrays.items():
        assert np.array_equal(found.tensors[name].numpy(), array.astype(np.asarray(array).dtype.newbyteorder("=")))
    assert found.columns == {"n": [0, 1, 2], "x": [1.0, 1.0, 1.0]}
    files = safetensors_numpy.load(bytes(found.tensor_file()))
    assert np.array_equal(files["strided"], arrays["strided"])


def test_names_lists_and_removal(db):
    names = ["b", "a/2", "a/1", "é" * 200, "😀", "r", "b\0c"]
    for name in names:
        db.artifacts.save(name, config=name)
    assert [each.name for each in db.artifacts.list()] == sorted(names, key=str.encode)
    assert [db.artifacts.load(name).config for name in names] == names
    with pytest.raises(StoreError, match="already"):
        db.artifacts.save("b", config=2)
    assert db.artifacts.load("b").config == "b"
    db.artifacts.save("b", columns={"x": [1]}, replace=True)
    assert db.artifacts.load("b").columns == {"x": [1]}
    db.artifacts.save("b", config=3, replace=True)
    assert (db.artifacts.load("b").columns, db.artifacts.load("b").config) == ({}, 3)
    db.artifacts.remove("b")
    for call in (db.artifacts.load, db.artifacts.remove):
        with pytest.raises(NodeNotFoundError, match="no artifact 'b'"):
            call("b")
    assert db.artifacts.find("b") is None
    assert db.stat()["num_artifacts"] == len(names) - 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": ""}, "name of an artifact"),
        ({"name": "x" * 401}, "name of an artifact"),
        ({"name": "\ud800"}, "name of an artifact"),
        ({"name": 3}, "name of an artifact"),
        ({"tensors": {"x": [1, 2]}}, "lists are columns"),
        ({"tensors": {"x": torch.ones(2, dtype=torch.complex64)}}, "complex64 cannot be kept"),
        ({"tensors": {"x": torch.ones(2).to_sparse()}}, "cannot be kept"),
        ({"tensors": {"x": np.array(["a"])}}, "cannot be kept"),
        ({"tensors": [torch.ones(2)]}, "must be a dict"),
        ({"tensors": {"__metadata__": torch.ones(2)}}, "__metadata__"),
        ({"tensors": {"x": torch.ones(2)}, "columns": {"x": [1]}}, "a tensor and a column"),
        ({"columns": {"x": [1], "y": [1, 2]}}, "several lengths: x: 1, y: 2"),
        ({"columns": {"x": [1, "a"]}}, "holds int, str"),
        ({"columns": {"x": [None]}}, "holds NoneType"),
        ({"columns": {"x": [2**63]}}, "cannot be kept"),
        ({"columns": {"x": ["\ud800"]}}, "cannot be kept"),
        ({"config": {1, 2}}, "the config cannot be kept"),
        ({"config": torch.ones(1)}, "the config cannot be kept"),
        ({"notes": 3}, "notes"),
        ({"notes": "\ud800"}, "cannot be kept"),
        ({"columns": {f"column {n}": [] for n in range(30000)}}, "too much|cannot be kept"),
        ({"notes": "x" * (17 << 20)}, "16 MiB"),
        ({"plot": {"kind": "line", "y": "z"}}, "neither a tensor nor a column"),
        ({"plot": {"kind": "pie", "y": "z"}}, "a plot of kind 'pie'"),
        ({"plot": {"y": "z"}}, "kind is needed"),
        ({"plot": {"kind": "line", "y": "z", "colour": "red"}}, "fields are"),
        ({"plot": {"kind": "heatmap", "y": "z"}}, "a heatmap without z"),
        ({"plot": {"kind": "line", "y": 3}}, "a plot is"),
    ],
)
def test_what_cannot_be_kept_is_refused(db, options, reason):
    with pytest.raises(InputTypeError, match=reason):
        db.artifacts.save(**{"name": "x", **options})
    assert db.artifacts.list() == []


def damage(db, key, at=-1):
    def work(writer):
        value = bytearray(writer.get(ARTIFACTS, key))
        value[at] ^= 1
        writer.put(ARTIFACTS, key, value)

    db._index.transact(work)


@pytest.mark.parametrize("key", [None, KEY])
def test_damage_is_never_a_result(store_path, key):
    with PromptDB(store_path, key=key) as db:
        fill(db)
        fill(db, "probe/2")
        damage(db, blob_key("probe/1"))
        assert db.artifacts.find("probe/1").config == CONFIG
        with pytest.raises(CorruptDataError, match="checksum of the numbers"):
            db.artifacts.load("probe/1")
        assert [(each.table, each.key) for each in db.verify()] == [(ARTIFACTS, record_key("probe/1").hex())]
        with pytest.raises(CorruptDataError, match="damaged"):
            db.compact()
        db.verify(fix=True)
        assert db.verify() == []
        assert [each.name for each in db.artifacts.list()] == ["probe/2"]
        check(db.artifacts.load("probe/2"), "probe/2")
        damage(db, record_key("probe/2"), 20)
        with pytest.raises(CorruptDataError):
            db.artifacts.load("probe/2")
        assert len(db.verify()) == 2  # the record, and numbers that nobody owns
        fill(db, "probe/2", replace=True)
        assert db.verify() == []
        damage(db, record_key("probe/2"), 20)
        db.artifacts.remove("probe/2")
        assert db.verify() == []
        assert db._index.stats()


def test_what_stands_under_another_name_is_noticed(db):
    db.artifacts.save("probing-1", columns={"x": [1]})
    db.artifacts.save("probing-2", columns={"x": [2]})  # the same seed for its checksum

    def swap(writer):
        writer.put(ARTIFACTS, record_key("probing-1"), bytes(writer.get(ARTIFACTS, record_key("probing-2"))))

    db._index.transact(swap)
    with pytest.raises(CorruptDataError, match="cannot be"):
        db.artifacts.load("probing-1")

    def swap_numbers(writer):
        writer.put(ARTIFACTS, blob_key("probing-2"), bytes(writer.get(ARTIFACTS, blob_key("probing-1"))))

    db._index.transact(swap_numbers)
    with pytest.raises(CorruptDataError, match="checksum"):
        db.artifacts.load("probing-2")
    db.verify(fix=True)


def test_every_flipped_byte_is_noticed(db):
    db.artifacts.save("x", columns={"a": [1.5, 2.5], "t": ["p", "q"]}, config={"k": 1}, notes="n")
    expected = db.artifacts.load("x")
    rng = random.Random(0)
    for key in (record_key("x"), blob_key("x")):
        with db._index.read() as reader:
            size = reader.size(ARTIFACTS, key)
        for at in {0, size - 1, *(rng.randrange(size) for _ in range(40))}:
            damage(db, key, at)
            with pytest.raises(CorruptDataError):
                db.artifacts.load("x")
            damage(db, key, at)
    assert db.artifacts.load("x").columns == expected.columns


@pytest.mark.parametrize(
    "change",
    [
        {"name": "y"}, {"name": 3}, {"created_unix_s": 1}, {"created_by": None}, {"config": "{"}, {"config": 3},
        {"config": "[" * 100_000}, {"plot": "[]"}, {"plot": '{"kind": "pie"}'}, {"plot": 3}, {"notes": b"x"},
        {"key": 1}, {"columns": 3}, {"columns": [["a"]]}, {"columns": [["a", "text"], ["t", "text"]]},
        {"columns": [["a", "date"]]}, {"columns": [["a", "number"], ["t", "number"]]}, {"tensors": ["m", "n"]},
        {"tensors": [3]}, {"blob": 3}, {"blob": [1, b""]}, {"blob": [-1, b""]}, {"blob": [2**63, b""]},
        {"blob": [True, b""]}, {"blob": ["1", b""]}, {"columns": [["a", "number"], ["t", "text"], ["u", "number"]]},
    ],
)  # fmt: skip
def test_records_that_cannot_be_are_damage(db, change):
    """Their checksums hold: somebody wrote them so."""
    db.artifacts.save("x", columns={"a": [1.5, 2.5], "t": ["p", "q"]}, tensors={"m": torch.ones(2)})
    key = record_key("x")

    def rewrite(writer):
        fields = unpack_record(key, writer.get(ARTIFACTS, key))
        writer.put(ARTIFACTS, key, pack_record(key, {**fields, **change}))

    db._index.transact(rewrite)
    with pytest.raises(CorruptDataError):
        db.artifacts.load("x")
    assert db.verify()
    db.verify(fix=True)
    assert db.artifacts.list() == []


# As the first version of promptdb that had artifacts wrote them; never to be changed.
OLD_RECORD = (
    "XtyRS5oRWQ9N63{hgdhrillB~ZDprtZ){{Q!>O)ga%Ew3Wn^D<ZfSU5bIU>5RQx~y0063Ea%Ew3Wn^Dsd9HABZ*6dNWMUvNE-@}JrekkzW@%"
    "@(dm?OdB03;2E-@@1B5oo&AZ~SRY<;9~Y;SbDdm?LTZe$`lAR=sOZe=1YAR>7pIv`sjcp_bWrEYI@Wpku%Z**m&Yh`($r(<tyb!~2Ql#-!tr"
    "fzj@Vr6oYp?Iclb!}p0a+0B9rfzj@Vr6oYp>(8lWq5R_bY*UHZ*p^yp>3pMY;R(c%>k&y5ZD?)evnI(rHStnNKFPAr~"
)
OLD_BLOB = (
    "XaN8K00000dm?l$Z6Z2*B4l)VaAhJoB0@$nHX<w{b7*03Wg<FTF)T7&EFxrKbYWj_W@d9`baNs)TQDp%U41MfV=gcvI(s5yba`-PB03^THZ&"
    "qEB6DbAaAhJoTQXfNB4lB7VP9`%W^-k9b0RuhG%PYOU41MfV=gfwI(s5yba`-PB03^QHZ&qEB6DbAaAhJoTQXfNB4lB7VP9`%W^-k9b0RuhG"
    "B7MNHeG!zB4aKxB075_WOR9OWg<EvLQhXjA}k_vXkl<=B05_#T`VGGVRT_%Z)Rq5Wpr~QI$JX~EHgM=eJmnlE;AxJdm?0Xd2nSSIwDm#A}k_"
    "vXkl<=B05_#T`VGGVRT_%Z)Rq5Wpr~QI$JY1EHp4(eJmnlE;BA=Ze(*JI(s5yba`-PB03^THZ&qEB6DbAaAhJoTQXfNB4lB7VP9`%W^-k9b0"
    "RuhG%zeRHeG#vARr(hARr(hARr(hz&`-M0RR9100000|NsC0|NsC000000007`W00000008iR0RY3P0ssI2000000ssI200000"
)


def test_bytes_of_the_first_version_are_read():
    name = "gold/é"
    with PromptDB.in_memory() as db:

        def put(writer):
            writer.put(ARTIFACTS, b"r" + name.encode(), base64.b85decode(OLD_RECORD))
            writer.put(ARTIFACTS, b"b" + name.encode(), base64.b85decode(OLD_BLOB))

        db._index.transact(put)
        assert db.verify() == []
        found = db.artifacts.load(name)
        assert found.tensors["m"].tolist() == [[1.5, -2.0]]
        assert found.tensors["m"].dtype == torch.bfloat16
        assert found.columns == {"n": [1, -1], "x": [0.5, math.inf], "b": [True, False], "t": ["é", ""]}
        assert (found.config, found.notes) == ({"lr": 0.1, "n": None}, "note")
        assert found.plot.as_fields() == {"kind": "line", "y": ["x"]}
        assert (found.record.created_unix_s, found.record.created_by) == (1.7e9, "promptdb 0.1.0")


def put_prompt(db, first):
    packed = pack_tokens([first, *range(200)])
    db.put(Root("00" * 32, "11" * 32), packed, 0, encode_tokens(packed))


def test_they_stay_when_spans_go(store_path, tmp_path):
    with PromptDB(store_path, quota_bytes=20_000) as db:
        fill(db)
        for first in range(60):
            put_prompt(db, 1000 + first)
        assert db.usage()["num_evicted"] > 0
        db.gc(0)
        assert db.stat()["num_nodes"] == 0
        check(db.artifacts.load("probe/1"))
        db.compact()
        check(db.artifacts.load("probe/1"))
        backup(db, tmp_path / "copy")
        assert db.verify() == []
    with PromptDB(tmp_path / "copy", readonly=True) as db:
        check(db.artifacts.load("probe/1"))
        with pytest.raises(ReadOnlyStoreError):
            db.artifacts.save("x", config=1)


def test_older_versions_use_the_store_and_leave_them_alone(store_path):
    with PromptDB(store_path) as db:
        fill(db)
        put_prompt(db, 1)
    code = f"""
from promptdb import environment, format, index
older = tuple(name for name in format.TABLES if name != "artifacts")
environment.TABLES = index.TABLES = older
import promptdb.db, promptdb.verify
promptdb.db.sizes = lambda reader: (0, 0)
promptdb.verify.problems_of = lambda reader: []
from promptdb import PromptDB
from promptdb.keys import Root, pack_tokens
from promptdb.testing import encode_tokens
with PromptDB({str(store_path)!r}) as db:
    assert db.format_version == 2
    packed = pack_tokens(range(300, 500))
    db.put(Root("00" * 32, "11" * 32), packed, 0, encode_tokens(packed))
    db.gc()
    db.compact()
    assert db.verify() == []
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with PromptDB(store_path) as db:
        check(db.artifacts.load("probe/1"))
        assert (db.format_version, db.stat()["num_nodes"]) == (2, 2)
        assert db.verify() == []


def test_threads_and_killed_processes_leave_whole_artifacts(store_path):
    with PromptDB(store_path) as db:
        threads = [threading.Thread(target=lambda n=n: fill(db, f"t/{n}")) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for n in range(8):
            check(db.artifacts.load(f"t/{n}"), f"t/{n}")
    code = f"""
import array
from promptdb import PromptDB
with PromptDB({str(store_path)!r}) as db:
    print("ready", flush=True)
    for n in range(10**9):
        db.artifacts.save("x", columns={{"a": [n] * 20000, "b": [-n] * 20000}}, config=n, replace=True)
"""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.3 + random.random() * 0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with PromptDB(store_path) as db:
            assert db.verify() == []
            found = db.artifacts.load("x")
            assert set(found.columns["a"]) == {found.config}
            assert set(found.columns["b"]) == {-found.config}
