"""Keys and values in 8 bits: as near as promised, labelled, and never mixed with exact ones."""

import pytest
import torch
from cli_tools import run, run_json, write_checkpoint
from conftest import TEXT, shared_model, shared_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from promptdb import Engine, PromptDB
from promptdb.archive import BrokenArchiveError, Selection, export_nodes, import_archive
from promptdb.blobs import DTYPE_BYTES
from promptdb.errors import CorruptDataError, InputTypeError, NonFiniteError
from promptdb.format import BLOBS, KV_BLOB, META, STORE_KEY, unpack_record
from promptdb.keys import INT8, Root
from promptdb.quantise import dequantise, quantise
from promptdb.recompute import recompute

LONGER = TEXT + " And then some more of it, so that a part is loaded."


def fresh_cache(model, ids):
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return cache


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_number_is_further_off_than_half_a_step(seed, shape, exponent, dtype):
    numbers = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).to(dtype)
    numbers = torch.nan_to_num(numbers, posinf=1.0, neginf=-1.0)
    numbers[0] = 0
    codes, scales = torch.empty(shape, dtype=torch.int8), torch.empty(shape[:3])
    quantise(numbers, codes, scales)
    back = dequantise(codes, scales, dtype)
    assert back.dtype == dtype
    largest = numbers.double().abs().amax(-1, keepdim=True)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    # Numbers below float16's smallest normal one are rounded more coarsely.
    least = 2.0**-24 if dtype == torch.float16 else 1e-40
    off = (back.double() - numbers.double()).abs()
    assert (off <= largest * (1 / 254 + rounding) + least).all()
    assert (back[0] == 0).all()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_is_loaded_is_near_and_smaller(tmp_path, arch):
    model, tokenizer = shared_model(arch), shared_tokenizer()
    sizes = {}
    for codec in ("", INT8):
        with PromptDB(tmp_path / f"{arch}{codec}") as db:
            with Engine(db, model, tokenizer, kv_codec=codec) as engine:
                first = engine.put(TEXT)
            with db.read() as snapshot:
                sizes[codec] = sum(len(value) for key, value in snapshot.reader.scan(BLOBS) if key.endswith(b"kv"))
    assert sizes[INT8] < 0.45 * sizes[""]  # heads are tiny here: a scale is a larger part than in any real model
    expected = fresh_cache(model, list(first.token_ids))
    with (
        PromptDB(tmp_path / f"{arch}{INT8}", verify_reads="always") as db,
        Engine(db, model, tokenizer, kv_codec=INT8) as engine,
    ):
        found = engine.get(TEXT)
        assert found.tokens_computed == 0
        assert torch.equal(found.logits, first.logits)  # logits are stored as they are
        cache = found.past_key_values()
        for layer, plain in zip(cache.layers, expected.layers, strict=True):
            for ours, theirs in ((layer.keys, plain.keys), (layer.values, plain.values)):
                assert ours.dtype == theirs.dtype
                assert not torch.equal(ours, theirs)
                limit = theirs.abs().amax(-1, keepdim=True) / 254 + 1e-5
                assert ((ours - theirs).abs() <= limit).all()
        longer = engine.get(LONGER)
        assert longer.tokens_loaded > 0
        with torch.no_grad():
            logits = model(torch.tensor([longer.token_ids])).logits[0, -1]
        assert (longer.logits - logits).abs().max() < 0.05 * logits.abs().max()
        assert db.verify() == []


def test_exact_and_approximate_never_mix(db):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer) as exact, Engine(db, model, tokenizer, kv_codec=INT8) as rough:
        exact.put(TEXT)
        assert rough.lookup(TEXT).num_tokens == 0
        assert "with exact keys and values" in rough.explain(TEXT).reason
        assert rough.put(TEXT).tokens_computed > 0
        assert rough.root.digest != exact.root.digest
        rough.put(LONGER)
        assert exact.lookup(LONGER).num_tokens < rough.lookup(LONGER).num_tokens
        explained = exact.explain(LONGER)
        assert [other.fields for other in explained.other_roots] == [("kv_codec",)]
        assert "approximate keys and values" in explained.reason
        assert exact.get(LONGER).tokens_computed > 0
        known = {"model": exact.root.weights_id, "tokenizer": exact.root.tokenizer_id}
        assert db.lookup(exact.tokenize(TEXT).packed, **known, kv_codec=INT8).is_complete


def test_plain_roots_have_the_digest_that_they_always_had():
    assert Root("aa", "bb", "n", "i").digest == Root("aa", "bb", "n", "i", "").digest
    assert len({Root("aa", "bb", *rest).digest for rest in (("",), ("int8",), ("", "int8"), ("", "", "int8"))}) == 4


def test_the_store_becomes_one_of_version_3(db):
    def version():
        with db.read() as snapshot:
            return unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))["format_version"]

    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        engine.put(TEXT)
    assert version() == 2
    with Engine(db, model, tokenizer, kv_codec=INT8) as engine:
        assert version() == 2
        engine.put(TEXT)
    assert version() == 3


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "key": b"\7" * 32}])
def test_batches_and_branches(tmp_path, options):
    """Spans of a tree, cut off and extended; also compressed and encrypted."""
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    prompts = [TEXT[: 40 + 7 * number] + f" branch {number}" for number in range(6)]
    with PromptDB(tmp_path / "store", chunk_tokens=16, **options) as db:
        with Engine(db, model, tokenizer, kv_codec=INT8) as engine:
            first = list(engine.run(prompts))
        with Engine(db, model, tokenizer, kv_codec=INT8) as engine:
            again = list(engine.run(prompts))
            assert sum(each.tokens_computed for each in again) == 0
            for one, other in zip(first, again, strict=True):
                assert torch.equal(one.logits, other.logits)
            longer = engine.get(prompts[3] + " and on")
            with torch.no_grad():
                logits = model(torch.tensor([longer.token_ids])).logits[0, -1]
            assert (longer.logits - logits).abs().max() < 0.05 * logits.abs().max()
        assert db.verify() == []


def test_verify_reports_its_error(db):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer, kv_codec=INT8) as rough, Engine(db, model, tokenizer) as exact:
        rough.put(TEXT)
        exact.put(TEXT)
        found, plain = recompute(rough, 100), recompute(exact, 100)
    assert (found.kv_codec, plain.kv_codec) == (INT8, "")
    assert found.is_exact
    assert plain.is_exact
    assert plain.worst < 1e-4 < 1 / 2000 < found.worst < 0.02
    assert all(layer.keys > 0 and layer.values > 0 for layer in found.layers)


def test_a_wrong_scale_is_more_than_the_codec_makes(db, monkeypatch):
    model, tokenizer = shared_model("llama"), shared_tokenizer()

    def broken(numbers, codes, scales):
        quantise(numbers, codes, scales)
        scales *= 1.3

    monkeypatch.setattr("promptdb.kv.quantise", broken)
    with Engine(db, model, tokenizer, kv_codec=INT8) as engine:
        engine.put(TEXT)
        assert not recompute(engine, 100).is_exact


def test_archives(db, tmp_path):
    """An export holds them as they are stored; what is cut off and imported loads the same."""
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer, kv_codec=INT8) as engine:
        engine.put(LONGER)
    export_nodes(db, Selection(), tmp_path / "archive")
    with PromptDB(tmp_path / "whole", chunk_tokens=16) as whole, PromptDB(tmp_path / "cut", chunk_tokens=16) as cut:
        with Engine(cut, model, tokenizer, kv_codec=INT8) as engine:
            engine.put(LONGER[:25])  # the archive's spans overlap it: their first tokens are cut off
        for other in (whole, cut):
            assert import_archive(other, tmp_path / "archive").is_complete
            assert other.verify() == []
            with (
                Engine(other, model, tokenizer, kv_codec=INT8) as engine,
                Engine(db, model, tokenizer, kv_codec=INT8) as source,
            ):
                assert engine.lookup(LONGER).num_tokens == source.lookup(LONGER).num_tokens
                ours, theirs = (each.get(LONGER).past_key_values() for each in (engine, source))
                for one, two in zip(ours.layers, theirs.layers, strict=True):
                    torch.testing.assert_close(one.keys, two.keys, rtol=0, atol=0.02)
    with PromptDB(tmp_path / "whole") as whole, PromptDB(tmp_path / "back") as back:
        export_nodes(whole, Selection(), tmp_path / "again")
        assert import_archive(back, tmp_path / "again").spans_stored > 0


def test_archives_in_unknown_codecs_are_refused(db, tmp_path, monkeypatch):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer, kv_codec=INT8) as engine:
        engine.put(TEXT)
    export_nodes(db, Selection(), tmp_path / "archive")
    monkeypatch.setattr("promptdb.intake.KV_CODECS", ("",))
    with PromptDB(tmp_path / "other") as other, pytest.raises(BrokenArchiveError, match="codec"):
        import_archive(other, tmp_path / "archive")


def test_wrong_use(db):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with pytest.raises(InputTypeError, match="choose"):
        Engine(db, model, tokenizer, kv_codec="int4")
    with pytest.raises(InputTypeError, match="strict"):
        Engine(db, model, tokenizer, kv_codec=INT8, strict=True)


def test_blobs_without_their_scales_are_damage(db, monkeypatch):
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer, kv_codec=INT8) as engine:
        engine.put(TEXT)
        match = engine.lookup(TEXT)
        with db.read() as snapshot:
            node = match.steps[0].node
            record = snapshot.record(node)
            tensors = snapshot.blob(node, record, KV_BLOB)
            assert {view.dtype for view in tensors.values()} == {"I8", "F32"}
            assert all(DTYPE_BYTES[view.dtype] for view in tensors.values())
            from promptdb.intake import kv_specs
            from promptdb.kv import _checked

            del tensors["kv.0.scale"]
            with pytest.raises(CorruptDataError, match="scale"):
                _checked(tensors, kv_specs(record.layout, record.num_tokens, INT8))


def test_the_command_line_labels_it(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    path = str(tmp_path / "store")
    run("put", "--db", path, "--model", model, "--kv-codec", "int8", TEXT)
    assert run_json("get", "--db", path, "--model", model, TEXT, code=1)["num_stored"] == 0
    assert run_json("get", "--db", path, "--model", model, "--kv-codec", "int8", TEXT)["is_complete"]
    nodes = run_json("ls", "--db", path)["nodes"]
    assert {each["kv_codec"] for each in nodes} == {"int8"}
    assert "int8" in run("ls", "--db", path).stdout
    shown = run("show", "--db", path, nodes[0]["node"]).stdout
    assert "keys and values are approximate (int8)" in shown
    assert "approximate int8" in run("tree", "--db", path).stdout
    explained = run("explain", "--db", path, "--model", model, TEXT, code=1).stdout
    assert "approximate keys and values" in explained
    assert "approximate (int8)" in run("explain", "--db", path, "--model", model, "--kv-codec", "int8", TEXT).stdout
    verified = run("verify", "--db", path, "--model", model, "--recompute", "5", "--kv-codec", "int8").stdout
    assert "keys and values are approximate (int8)" in verified
    run(
        "get",
        "--db",
        path,
        "--model",
        model,
        "--kv-codec",
        "int8",
        "--out",
        str(tmp_path / "x.safetensors"),
        TEXT,
        code=2,
    )


def test_nan_is_refused(db, monkeypatch):
    model, tokenizer = shared_model("llama"), shared_tokenizer()

    def spoil(self, group, start, end, target):
        target.fill_(float("nan"))

    monkeypatch.setattr("promptdb.kv.KvSource.copy", spoil)
    with Engine(db, model, tokenizer, kv_codec=INT8, write_behind=False) as engine, pytest.raises(NonFiniteError):
        engine.put(TEXT)
