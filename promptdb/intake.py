"""What a span from a file of others must be before it is stored, and how its first tokens are cut off. No torch.

Everything is compared with the span's record, and the record with what a model can compute: a span passes with the
blobs and tensors that FORMAT.md gives and no others, in sizes that follow from its layout, without NaN or infinity in
keys and values.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from promptdb.activations import LENGTHS, OFFSETS, ROWS, Entry, Series, is_of, read_entry
from promptdb.blobs import DTYPE_BYTES, Blob, TensorSpec, TensorView, build_blob, parse_blob
from promptdb.errors import CorruptDataError, IdentityError
from promptdb.format import KV_BLOB, LOGPROBS_BLOB, Layout, NodeRecord
from promptdb.hook_points import POINTS, HookVariableNames, is_module_path
from promptdb.keys import DIGEST_BYTES, INT8, KV_CODECS, Root
from promptdb.opening import MAX_CHUNK_TOKENS

Bytes = bytes | bytearray | memoryview

MAX_PROMPT_TOKENS = 1 << 24
UNKNOWN_ID = -1  # of a most probable token
MAX_LOGITS_BYTES = 64 << 20
_MAX_TEXT = 1024
_MAX_GROUPS = 1024
_MAX_DIMENSION = 1 << 24
_MAX_PROVENANCE = 64

# A blob's header is JSON of about 100 bytes a tensor; what is longer was not written by promptdb.
_HEADER_BYTES = 512

_ROW_DTYPES = ("F64", "F32", "F16", "BF16")

_MODEL_FIELDS = {
    "model_type": str, "name": str, "dtype": str, "num_layers": int, "num_parameters": int, "max_tokens": int
}  # fmt: skip

# By dtype: where the top bytes of numbers stand, and which values of the top byte, and of the one below it, every NaN
# and infinity has (little-endian; sign ignored). One byte is enough where all of the exponent is in it.
_EXPONENTS: dict[str, tuple[int, bytes, bytes | None]] = {
    "F64": (8, bytes((0x7F, 0xFF)), bytes(range(0xF0, 0x100))),
    "F32": (4, bytes((0x7F, 0xFF)), bytes(range(0x80, 0x100))),
    "BF16": (2, bytes((0x7F, 0xFF)), bytes(range(0x80, 0x100))),
    "F16": (2, bytes((*range(0x7C, 0x80), *range(0xFC, 0x100))), None),
    "F8_E5M2": (1, bytes((*range(0x7C, 0x80), *range(0xFC, 0x100))), None),
    "F8_E4M3": (1, bytes((0x7F, 0xFF)), None),
}
_PIECE_BYTES = 1 << 18  # stays in the processor's cache


def _marks(values: bytes) -> bytes:
    return bytes(1 if value in values else 0 for value in range(256))


_TABLES = {
    dtype: (width, _marks(top), None if below is None else _marks(below))
    for dtype, (width, top, below) in _EXPONENTS.items()
}


def is_finite(view: TensorView) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; exact. Integers are finite. About 1 GB/s."""
    if view.dtype not in _TABLES:
        return True
    width, top, below = _TABLES[view.dtype]
    for at in range(0, len(view.data), _PIECE_BYTES):
        piece = bytes(view.data[at : at + _PIECE_BYTES])
        suspects = piece[width - 1 :: width].translate(top)
        if b"\1" not in suspects:
            continue
        if below is None:
            return False
        # As numbers: a byte of both is 1 where a number's top byte and the one below it are those of no finite one.
        both = piece[width - 2 :: width].translate(below)
        if int.from_bytes(suspects, "little") & int.from_bytes(both, "little"):
            return False
    return True


def _has_nan(view: TensorView) -> bool:
    return not is_finite(view) and any(map(math.isnan, view.floats()))


def _is_text(value: object, most: int = _MAX_TEXT) -> bool:
    """Whether a value is a text that may be shown: what steers a terminal is not."""
    return type(value) is str and len(value) <= most and value.isprintable()


def check_root(root: Root) -> None:
    """Raise :class:`CorruptDataError` unless the fields of a root have a sensible length."""
    if any(len(value) > _MAX_TEXT for value in vars(root).values()):
        raise CorruptDataError(f"an identity with a field of more than {_MAX_TEXT:,} characters")
    if root.kv_codec not in KV_CODECS:
        raise CorruptDataError("keys and values in a codec that is not known here", "upgrade promptdb")


def kv_specs(layout: Layout, num_tokens: int, kv_codec: str) -> list[TensorSpec]:
    """Return the tensors of the blob ``kv`` of a span, all of which have the tokens as third dimension."""
    specs = []
    for number, group in enumerate(layout):
        shape = group.span_shape(num_tokens)
        if kv_codec == INT8:
            specs += [TensorSpec(f"kv.{number}", "I8", shape), TensorSpec(f"kv.{number}.scale", "F32", shape[:3])]
        else:
            specs.append(TensorSpec(f"kv.{number}", group.dtype, shape))
    return specs


def score_specs(num_tokens: int) -> list[TensorSpec]:
    """Return the tensors of the blob ``lp`` of a span. The second may be missing."""
    return [TensorSpec("token_logprobs", "F32", (num_tokens,)), TensorSpec("greedy_ids", "I32", (num_tokens,))]


def _own_kv_specs(record: NodeRecord) -> list[TensorSpec]:
    return kv_specs(record.layout, record.num_tokens, record.root.kv_codec)


def check_record(record: NodeRecord) -> None:
    """Raise :class:`CorruptDataError` unless a record is that of a span which a model computed.

    Bounds all that is read because of it: the sizes of its blobs are those that follow from layout and tokens.
    """
    if record.num_tokens > MAX_CHUNK_TOKENS or record.end > MAX_PROMPT_TOKENS:
        raise CorruptDataError(f"a span of {record.num_tokens:,} tokens that ends at {record.end:,}")
    _check_layout(record.layout)
    if set(record.blobs) != {KV_BLOB, LOGPROBS_BLOB}:
        raise CorruptDataError(f"a span with blobs {sorted(record.blobs)}, where kv and lp should be")
    expected = {KV_BLOB: _own_kv_specs(record), LOGPROBS_BLOB: score_specs(record.num_tokens)}
    for kind, specs in expected.items():
        most = sum(spec.size_bytes for spec in specs) + _HEADER_BYTES * (1 + len(specs))
        if record.blobs[kind].size_bytes > most:
            raise CorruptDataError(f"a blob {kind} of {record.blobs[kind].size_bytes:,} bytes, where {most:,} may be")
    seconds = (record.compute_s, record.created_unix_s)
    if not all(math.isfinite(value) and 0 <= value < 1 << 53 for value in seconds):
        raise CorruptDataError(f"a span that took {record.compute_s} s at {record.created_unix_s}")
    if len(record.provenance) > _MAX_PROVENANCE or not all(
        _is_text(name) and (_is_text(value) or type(value) in (int, float)) for name, value in record.provenance.items()
    ):
        raise CorruptDataError("a span whose provenance cannot be")


def _check_layout(layout: Layout) -> None:
    slots = [slot for group in layout for slot in group.slots]
    sound = (
        0 < len(layout) <= _MAX_GROUPS
        and 0 < len(slots) == len(set(slots))
        and all(
            0 < number <= _MAX_DIMENSION
            for group in layout
            for number in (len(group.slots), group.kv_heads, group.head_dim)
        )
        and all(group.dtype in DTYPE_BYTES for group in layout)
    )
    if not sound:
        raise CorruptDataError("a span with a layout that cannot be")


def check_blobs(record: NodeRecord, blobs: Mapping[str, Bytes]) -> None:
    """Raise :class:`CorruptDataError` unless the blobs of a span hold exactly the tensors that its record says.

    Reads every number: keys and values must be finite, and log-probabilities known but for a prompt's first token.
    """
    tensors = parse_blob(blobs[KV_BLOB])
    specs = _own_kv_specs(record)
    _check_tensors(KV_BLOB, tensors, specs, required=len(specs))
    for name, view in tensors.items():
        if not is_finite(view):
            raise CorruptDataError(f"keys or values with NaN or infinity in {name}")
    tensors = parse_blob(blobs[LOGPROBS_BLOB])
    _check_tensors(LOGPROBS_BLOB, tensors, score_specs(record.num_tokens), required=1)
    logprobs = tensors["token_logprobs"].floats()
    if any(map(math.isnan, logprobs[1 if record.start == 0 else 0 :])):
        raise CorruptDataError("log-probabilities with NaN")
    if "greedy_ids" in tensors and min(_int32(tensors["greedy_ids"].data)) < UNKNOWN_ID:
        raise CorruptDataError("a token ID below zero among the most probable ones")


def _int32(data: memoryview) -> array[int]:
    values = array("i")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _check_tensors(kind: str, tensors: Mapping[str, TensorView], specs: Sequence[TensorSpec], *, required: int) -> None:
    expected = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    found = {name: (view.dtype, view.shape) for name, view in tensors.items()}
    needed = {spec.name for spec in specs[:required]}
    if not needed <= set(found) or any(expected.get(name) != what for name, what in found.items()):
        raise CorruptDataError(f"a blob {kind} with other tensors than its record says")


def check_logits(blob: Bytes) -> None:
    """Raise :class:`CorruptDataError` unless a blob holds next-token logits and nothing else. Infinity is allowed."""
    tensors = parse_blob(blob)
    view = tensors.get("logits")
    if view is None or len(tensors) != 1 or view.dtype not in ("F64", "F32", "F16", "BF16"):
        raise CorruptDataError("a blob with other tensors than logits")
    if len(view.shape) != 1 or not view.shape[0]:
        raise CorruptDataError(f"logits of shape {view.shape}")
    if _has_nan(view):
        raise CorruptDataError("logits with NaN")


def check_activations(record: NodeRecord, name: bytes, blob: Bytes) -> tuple[Series, Entry]:
    """Return recorded activations of a span; raise :class:`CorruptDataError` unless they can be what they say.

    Parameters
    ----------
    name : the key of the entry, without the node ID.

    Notes
    -----
    Reads every number: all must be finite, but for what a mask hides.
    """
    series = Series.of_key(bytes(DIGEST_BYTES) + name)
    point = POINTS.get(series.point)
    if point is None and not is_module_path(series.point):
        raise CorruptDataError("recorded activations of a point that nobody knows")
    if (point is not None and point.by_layer) != (series.layer is not None) or not _is_text(series.point):
        raise CorruptDataError("recorded activations of a layer that cannot be")
    if series.dtype not in _ROW_DTYPES:
        raise CorruptDataError(f"recorded activations of {series.dtype}")
    if not set(parse_blob(blob)) <= {ROWS, OFFSETS, LENGTHS}:
        raise CorruptDataError("a blob with other tensors than recorded activations")
    entry = read_entry(blob)
    if not is_of(entry, series, record.num_tokens, record.start):
        raise CorruptDataError(f"recorded activations, {series}, are not those of the span")
    if not is_finite(entry.rows):
        is_masked = series.point == HookVariableNames.POST_MASK_ATTN_WEIGHTS
        if not is_masked or any(math.isnan(value) or value == math.inf for value in entry.rows.floats()):
            raise CorruptDataError(f"recorded activations, {series}, with NaN or infinity")
    return series, entry


def own_tensors(record: NodeRecord, kind: str, tensors: Mapping[str, TensorView]) -> Blob:
    """Return a blob with those tensors of a stored one that an archive holds, in the order of FORMAT.md."""
    specs = _own_kv_specs(record) if kind == KV_BLOB else score_specs(record.num_tokens)
    present = [spec for spec in specs if spec.name in tensors]
    _check_tensors(kind, {spec.name: tensors[spec.name] for spec in present}, present, required=len(present))
    return build_blob([(spec, tensors[spec.name].data) for spec in present])


def own_logits(view: TensorView) -> Blob:
    """Return a blob with stored logits alone."""
    return build_blob([(TensorSpec("logits", view.dtype, view.shape), view.data)])


def trim(record: NodeRecord, blobs: Mapping[str, Bytes], skip: int, stop: int | None = None) -> dict[str, Blob]:
    """Return checked blobs of a span without its first ``skip`` tokens, and those from ``stop`` on: one copy."""
    stop = record.num_tokens if stop is None else stop
    left = stop - skip
    keys_values = parse_blob(blobs[KV_BLOB])
    kept = []
    for spec in kv_specs(record.layout, left, record.root.kv_codec):
        data = keys_values[spec.name].data
        row_bytes = math.prod(spec.shape[3:]) * DTYPE_BYTES[spec.dtype]
        head_bytes = record.num_tokens * row_bytes
        rows = [data[at + skip * row_bytes : at + stop * row_bytes] for at in range(0, len(data), head_bytes)]
        kept.append((spec, b"".join(rows)))
    scores = parse_blob(blobs[LOGPROBS_BLOB])
    tails = [(spec, scores[spec.name].data[4 * skip : 4 * stop]) for spec in score_specs(left) if spec.name in scores]
    return {KV_BLOB: build_blob(kept), LOGPROBS_BLOB: build_blob(tails)}


def described(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what may be taken over from a model's entry in another registry, or None if it cannot be.

    Never what an engine found out on another machine: rates, and whether extending a prefix was exact there.
    """
    taken = {name: fields[name] for name in _MODEL_FIELDS if name in fields}
    for name, value in taken.items():
        is_size = type(value) is int and 0 <= value < 1 << 63
        if not (_is_text(value) if _MODEL_FIELDS[name] is str else is_size):
            return None
    return taken


def checked_tokenizer(tokenizer_id: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what may be taken over from a tokenizer's entry in another registry, or None if its ID cannot be checked.

    The ID is that of the tokenizer that the entry makes. The ID of a transformers tokenizer depends on more than its
    entry holds, so only entries of bare ``tokenizers.Tokenizer`` objects pass. Cost: loads the tokenizer.
    """
    text, flag, name = fields.get("json"), fields.get("encode_special_tokens"), fields.get("name", "")
    if type(text) is not str or not text or type(flag) is not bool or not _is_text(name):
        return None
    import tokenizers

    from promptdb.tokenizer_identity import tokenizer_id as identify

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.encode_special_tokens = flag
        found = identify(tokenizer)
    except IdentityError:
        return None
    except BaseException as error:  # the library raises bare Exception, and panics as BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        return None
    return {"json": text, "encode_special_tokens": flag, "name": name} if found == tokenizer_id else None
