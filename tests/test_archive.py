"""Archives: what goes out comes in again, whatever the cuts; what is odd in a store stays there."""

import io

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
    flip_last,
    frames_of,
    imported,
    lookup,
    num_logits,
    put,
    rewritten,
    tamper,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptdb import Engine, PromptDB
from promptdb.archive import BrokenArchiveError, Selection, export_nodes
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
