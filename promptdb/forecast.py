"""What a batch would cost, told from the store and the prompts' tokens alone: no model, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from promptdb.blobs import DTYPE_BYTES, TensorSpec, plan_blob
from promptdb.db import PromptDB
from promptdb.format import CHECKSUM_BYTES
from promptdb.keys import DIGEST_BYTES, Root
from promptdb.levels import Levels
from promptdb.opening import DEFAULT_CHUNK_TOKENS
from promptdb.plan import Limits, Piece, sections
from promptdb.tokens import Prompt
from promptdb.tree import Branch, Segment, build
from promptdb.trie import cut

# What batches of an engine take at once, by kind of device: tokens of a pass, bytes of keys and values.
_PASS_TOKENS, _CACHE_BYTES = {"cpu": 512}, {"cpu": 2 << 30}
_PASS_TOKENS_ELSEWHERE, _CACHE_BYTES_ELSEWHERE = 4096, 8 << 30
_UNKNOWN_TOKEN_BYTES = 1 << 16

_TORCH_TO_BLOB = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Sizes:
    """How much a model's results take: bytes of a token's keys and values, and of the logits after one; None where
    nobody knows."""

    kv_bytes_per_token: int | None = None
    logits_bytes: int | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any], dtype: str) -> Sizes:
        """Return what a checkpoint's ``config.json`` tells.

        Parameters
        ----------
        dtype : what the weights are loaded as, such as ``"bfloat16"``; ``"auto"`` for the configuration's own.
        """
        if dtype == "auto":
            dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        element = DTYPE_BYTES.get(_TORCH_TO_BLOB.get(dtype, ""))
        if element is None:
            return cls()
        numbers, vocabulary = _kv_numbers(config), _first(config, "vocab_size")
        return cls(numbers and numbers * element, vocabulary and vocabulary * element)


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first field that is a positive number: architectures name the same thing differently."""
    return next((config[name] for name in names if type(config.get(name)) is int and config[name] > 0), None)


def _kv_numbers(config: Mapping[str, Any]) -> int | None:
    """Return how many numbers a token's keys and values have, in all layers, or None."""
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    if layers is None or heads is None:
        return None
    kv_heads = _first(config, "num_key_value_heads") or heads
    if config.get("model_type") == "falcon":  # which has the field, and does not read it unless
        kv_heads = _first(config, "num_kv_heads") or heads if config.get("new_decoder_architecture") else heads
        kv_heads = 1 if config.get("multi_query") and not config.get("new_decoder_architecture") else kv_heads
    rank, rope = _first(config, "kv_lora_rank"), _first(config, "qk_rope_head_dim")
    if rank and rope:  # latent attention: one vector for all heads
        return layers * (rank + rope)
    head_dim = _first(config, "head_dim") or (hidden and hidden // heads)
    return head_dim and 2 * layers * kv_heads * head_dim


@dataclass(frozen=True)
class Forecast:
    """What there is to do for prompts, before anything is done.

    Attributes
    ----------
    num_prompts, num_tokens : prompts, and their tokens all together.
    distinct_tokens : tokens after distinct prefixes; a batch computes each once.
    stored_tokens : of the distinct ones, those whose keys and values are stored.
    tokens_to_compute : what goes through the model: those that are not, and tokens before them whose logits are not.
    num_passes : forward passes.
    num_spans : spans to be written.
    bytes_to_write : of keys, values, log-probabilities and logits; None if their sizes are not known.
    compute_s : at the rate that was measured last; None if none was.
    """

    num_prompts: int
    num_tokens: int
    distinct_tokens: int
    stored_tokens: int
    tokens_to_compute: int
    num_passes: int
    num_spans: int
    bytes_to_write: int | None
    compute_s: float | None


def usual_limits(device_type: str, kv_bytes_per_token: int | None, way: str) -> Limits:
    """Return the limits that an engine's batches have on a kind of device, ``"cpu"`` or ``"cuda"``, run in a way."""
    alive = 4 if way == "batched" else 2  # caches, at once
    pass_tokens = _PASS_TOKENS.get(device_type, _PASS_TOKENS_ELSEWHERE)
    cache_bytes = _CACHE_BYTES.get(device_type, _CACHE_BYTES_ELSEWHERE)
    return Limits(
        pass_tokens=pass_tokens,
        chain_tokens=max(32, pass_tokens * 3 // 8),
        cache_tokens=max(1, cache_bytes // (alive * (kv_bytes_per_token or _UNKNOWN_TOKEN_BYTES))),
        may_pack=way == "packed",
    )


def way_of(fields: Mapping[str, Any]) -> str:
    """Return how batches of a model run, from its entry in the registry: the fastest way that was found exact."""
    exact = str(fields.get("exact_ways", "")).split()
    return next((way for way in ("packed", "batched") if way in exact), "single")


def forecast(
    db: PromptDB | None,
    root: Root | None,
    prompts: Iterable[Prompt],
    *,
    sizes: Sizes | None = None,
    limits: Limits | None = None,
    way: str | None = None,
    device_type: str = "cpu",
    want_logits: bool = True,
) -> Forecast:
    """Return what :meth:`promptdb.Engine.run` would do for prompts. Computes nothing, and writes nothing.

    Parameters
    ----------
    db : the store, or None if there is none yet.
    root : identity that the prompts would be computed with, or None if the store cannot know it: nothing is stored.
    prompts : read once.
    sizes : what the store's own measurements do not say; those of the model's configuration.
    limits : of a pass; by default those of an engine on ``device_type``, run in this way.
    way : ``"packed"``, ``"batched"`` or ``"single"``; by default what the store knows to be exact for the model, and
        ``"packed"`` if it does not know the model.
    want_logits : whether the logits after every prompt are stored, as :meth:`promptdb.Engine.run` does; scores do
        without.

    Raises
    ------
    CorruptDataError
        The index of the store is damaged.

    Notes
    -----
    All prompts are planned at once, which an engine does window by window: it may need some passes more, and compute
    a token again where prompts of different windows part. Memory: 4 bytes a token and about 1 kB a prompt, for all
    prompts together. Cost: one lookup a prompt, then as long as sorting them.
    """
    fields = (db.registry.model(root.weights_id) if db is not None and root is not None else None) or {}
    sizes = _completed(sizes or Sizes(), fields)
    way = way or (way_of(fields) if fields else "packed")
    limits = replace(limits or usual_limits(device_type, sizes.kv_bytes_per_token, way), may_pack=way == "packed")
    branches = list(_branches(db, root, prompts))
    segments = build(branches, want_logits=want_logits)
    chunk_tokens = db.chunk_tokens if db is not None else DEFAULT_CHUNK_TOKENS
    written = _Written(segments, chunk_tokens, want_logits=want_logits)
    num_passes = tokens = 0
    for pieces in _rows(segments, limits) if way == "batched" else _sections(segments, limits):
        num_passes += 1
        for piece in pieces:
            tokens += piece.num_tokens
            written.add(piece)
    rate = fields.get("compute_tokens_per_s")
    return Forecast(
        num_prompts=len(branches),
        num_tokens=sum(len(branch.packed) for branch in branches) // 4,
        distinct_tokens=sum(segment.end - segment.start for segment in segments),
        stored_tokens=sum(segment.stored - segment.start for segment in segments),
        tokens_to_compute=tokens,
        num_passes=num_passes,
        num_spans=written.num_spans,
        bytes_to_write=written.size_bytes(sizes),
        compute_s=tokens / rate if isinstance(rate, (int, float)) and rate > 0 else 0.0 if not tokens else None,
    )


def _completed(sizes: Sizes, fields: Mapping[str, Any]) -> Sizes:
    measured = fields.get("kv_bytes_per_token")
    if not isinstance(measured, (int, float)) or measured <= 0:
        return sizes
    return Sizes(round(measured), sizes.logits_bytes)


def _branches(db: PromptDB | None, root: Root | None, prompts: Iterable[Prompt]) -> Iterator[Branch]:
    for prompt in prompts:
        stored, has_logits = 0, False
        if db is not None and root is not None:
            # A snapshot for each: one for all would keep old pages of the store in use for as long as prompts come.
            with db.read() as snapshot:
                match = snapshot.match(root, prompt.packed)
            stored, has_logits = match.num_tokens, match.has_logits
        yield Branch(prompt.packed, prompt.boundaries, stored, has_logits)


def _sections(segments: Sequence[Segment], limits: Limits) -> Iterator[Sequence[Piece]]:
    for section in sections(segments, limits):
        yield section.new


def _rows(segments: Sequence[Segment], limits: Limits) -> Iterator[Sequence[Piece]]:
    levels: Levels[None] = Levels(segments, limits)
    while rows := levels.take():
        yield [row.piece for row in rows]
        for row in rows:
            levels.done(row, None)


class _Written:
    """Adds up what would be written for pieces, as :mod:`promptdb.passes` cuts them."""

    def __init__(self, segments: Sequence[Segment], chunk_tokens: int, *, want_logits: bool) -> None:
        self._segments, self._chunk_tokens, self._want_logits = segments, chunk_tokens, want_logits
        self.num_spans = self._num_tokens = self._num_logits = self._overhead_bytes = 0

    def add(self, piece: Piece) -> None:
        segment = self._segments[piece.segment]
        start = max(piece.start, segment.stored)
        spans = cut(start, piece.end, sorted(segment.boundaries), self._chunk_tokens)
        self.num_spans += len(spans)
        self._num_tokens += piece.end - start
        again = {segment.stored} if piece.start < segment.stored else set()
        logits = {end for _, end in spans} | {piece.end} | again
        if not self._want_logits and not segment.children and piece.end == segment.end:
            logits.discard(piece.end)
        self._num_logits += len(logits)
        self._overhead_bytes += sum(_scores_bytes(end - start) + _HEADER_BYTES for start, end in spans)

    def size_bytes(self, sizes: Sizes) -> int | None:
        if sizes.kv_bytes_per_token is None or sizes.logits_bytes is None:
            return None if self.num_spans or self._num_logits else 0
        logits = sizes.logits_bytes + CHECKSUM_BYTES + DIGEST_BYTES + _HEADER_BYTES
        return self._num_tokens * sizes.kv_bytes_per_token + self._overhead_bytes + self._num_logits * logits


# Of a blob with one tensor.
_HEADER_BYTES = len(plan_blob([TensorSpec("kv.0", "F32", (64, 8, 256, 128))]).header)


def _scores_bytes(num_tokens: int) -> int:
    shape = (num_tokens,)
    return plan_blob([TensorSpec("token_logprobs", "F32", shape), TensorSpec("greedy_ids", "I32", shape)]).size_bytes
