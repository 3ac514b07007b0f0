"""Token bytes, digests and keys: fixed bytes, and oracles that compute them another way."""

from array import array

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from promptdb.errors import InputTypeError, PromptDBError, TextEncodingError, TokenRangeError
from promptdb.keys import (
    PrefixHasher,
    Root,
    child_key,
    common_prefix,
    node_id,
    num_tokens,
    pack_tokens,
    prefix_digests,
    unpack_tokens,
)
from promptdb.trie import cut

ROOT = Root("aa" * 32, "bb" * 32)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=300)
FEW_TOKENS = st.lists(st.sampled_from([0, 1, 256, 2**32 - 1]), max_size=300)

# Stored data is found by these digests: if one changes, every store loses its content. Bump ROOT_VERSION instead.
GOLDEN_ROOTS = {
    ROOT: "8d6249dfcd4ea472eeb9363157a13fc0e72255df53915b818f209ccc831ac382",
    Root("aa" * 32, "bb" * 32, "tenant"): "2fddbb53ababb625692b3d5a1c562a7524221050e9403922514dbad0360aea02",
    Root("aa" * 32, "bb" * 32, "", "tenant"): "cdd340e30baa0fe3d1148dfb098cbd9275ed84e345368eee39a536c9393c1d40",
    Root("", "", "Zürich"): "7f0eab4bfd92d8b1566fc7a670217893ab3ee2851264ce2807df2cbc863b2c33",
}
GOLDEN_PREFIXES = {
    0: "6091501124d13f29d83c8f6026190aba56eb781dc72c732751916b288a49b4f8",
    1: "f1dd73fdfa740f7a5bfb96b353c71f2c6c439a527b68252ff2e7b3e47029d780",
    3: "b5e589e38d9a4978e52e6a728506876d85f38fd462624751d4065e5524b4861b",
    1000: "d23f3509e399eedac05155dbf0bf1cd3a917fe368e4af7df8dfdc28de8d28a67",
}
GOLDEN_NODE = "0449eb7a3723e7fef581f45e8b6fb4dba2532062ce2631c87fa0d14f4a1c16bf"


def little_endian(tokens):
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def fields_digest(*fields):
    """Hash (tag, type, bytes) fields as FORMAT.md says, without the code under test."""
    content = b""
    for tag, kind, raw in fields:
        content += len(tag).to_bytes(8, "little") + tag + kind + len(raw).to_bytes(8, "little") + raw
    return blake3(content).digest()


@pytest.mark.parametrize("root", GOLDEN_ROOTS, ids=str)
def test_root_digest(root):
    assert root.digest.hex() == GOLDEN_ROOTS[root]
    assert root.digest == fields_digest(
        (b"domain", b"s", b"promptdb root"),
        (b"version", b"i", (1).to_bytes(8, "little")),
        (b"weights", b"s", root.weights_id.encode()),
        (b"tokenizer", b"s", root.tokenizer_id.encode()),
        (b"namespace", b"s", root.namespace.encode()),
        (b"intervention", b"s", root.intervention_id.encode()),
    )


@given(*[st.text(max_size=3)] * 8)
def test_roots_differ_where_fields_differ(a, b, c, d, e, f, g, h):
    left, right = Root(a, b, c, d), Root(e, f, g, h)
    assert (left.digest == right.digest) == (left == right)


def test_root_refuses_what_is_not_text():
    with pytest.raises(InputTypeError, match="namespace must be a str, not int"):
        Root("aa", "bb", 7)
    with pytest.raises(TextEncodingError, match="namespace is not valid Unicode"):
        Root("aa", "bb", "\ud800")


def test_prefix_digests_are_fixed():
    packed = pack_tokens(range(1000))
    positions = sorted(GOLDEN_PREFIXES)
    assert [digest.hex() for digest in prefix_digests(ROOT.digest, packed, positions)] == list(GOLDEN_PREFIXES.values())
    (start,) = prefix_digests(ROOT.digest, packed, [3])
    assert node_id(start, packed[12:40]).hex() == GOLDEN_NODE


@given(FEW_TOKENS, st.lists(st.integers(0, 300)))
def test_prefix_digest_is_one_keyed_hash(tokens, positions):
    positions = sorted(min(position, len(tokens)) for position in positions)
    digests = list(prefix_digests(ROOT.digest, pack_tokens(tokens), positions))
    assert digests == [blake3(little_endian(tokens[:i]), key=ROOT.digest).digest() for i in positions]


def test_prefix_hasher_goes_forward_only():
    hasher = PrefixHasher(ROOT.digest, pack_tokens([1, 2, 3]))
    hasher.at(2)
    assert hasher.at(2) == hasher.at(2)
    with pytest.raises(ValueError, match="forward"):
        hasher.at(1)


@given(TOKENS)
def test_pack_is_little_endian_and_unpacks(tokens):
    packed = pack_tokens(tokens)
    assert packed == little_endian(tokens)
    assert list(unpack_tokens(packed)) == tokens
    assert num_tokens(packed) == len(tokens)
    assert pack_tokens(array("I", tokens)) == pack_tokens(array("q", tokens)) == pack_tokens(iter(tokens)) == packed


@pytest.mark.parametrize("bad", [[-1], [2**32], [0, 2**70]])
def test_pack_refuses_other_numbers(bad):
    with pytest.raises(TokenRangeError) as caught:
        pack_tokens(bad)
    assert isinstance(caught.value, (ValueError, PromptDBError))


def test_text_is_not_token_ids():
    with pytest.raises(InputTypeError, match="not str") as caught:
        pack_tokens("abc")
    assert "tokenise" in caught.value.hint


@pytest.mark.parametrize("bad", [[1.0], ["a"], [None], "abc", 5, [[1]], b"abcd", bytearray(4), memoryview(b"abcd")])
def test_pack_refuses_other_types(bad):
    with pytest.raises(InputTypeError) as caught:
        pack_tokens(bad)
    assert isinstance(caught.value, TypeError)


def test_pack_takes_numpy_and_torch_integers():
    numpy = pytest.importorskip("numpy")
    assert pack_tokens(numpy.array([1, 2], dtype=numpy.int64)) == little_endian([1, 2])
    with pytest.raises(InputTypeError):
        pack_tokens(numpy.array([1.0, 2.0]))


@given(FEW_TOKENS, FEW_TOKENS, FEW_TOKENS)
def test_common_prefix_counts_tokens(shared, left, right):
    left, right = shared + left, shared + right
    naive = 0
    while naive < min(len(left), len(right)) and left[naive] == right[naive]:
        naive += 1
    assert common_prefix(pack_tokens(left), pack_tokens(right)) == naive
    assert common_prefix(memoryview(pack_tokens(right)), memoryview(pack_tokens(left))) == naive


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), FEW_TOKENS)
def test_child_keys_sort_as_numbers(left, right, rest):
    left_key = child_key(bytes(32), pack_tokens([left, *rest]))
    right_key = child_key(bytes(32), pack_tokens([right]))
    assert left_key == bytes(32) + left.to_bytes(4, "big")
    assert (left_key < right_key) == (left < right)


@given(st.integers(0, 2000), st.integers(0, 600), st.lists(st.integers(-5, 2700), max_size=20), st.integers(1, 300))
def test_cut_tiles(start, length, boundaries, chunk_tokens):
    end = start + length
    spans = cut(start, end, boundaries, chunk_tokens)
    assert [position for span in spans for position in range(*span)] == list(range(start, end))
    assert all(0 < stop - begin <= chunk_tokens for begin, stop in spans)
    wanted = {b for b in boundaries if start < b < end} | {m for m in range(start + 1, end) if m % chunk_tokens == 0}
    assert {begin for begin, _ in spans[1:]} == wanted


def test_cut_of_nothing():
    assert cut(5, 5, [5], 4) == []
    assert cut(6, 5, [], 4) == []
