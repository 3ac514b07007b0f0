"""Between stored spans and model-ready caches: one copy each way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from promptdb.blobs import Blob, TensorSpec, TensorView, build_blob, parse_blob, plan_blob
from promptdb.buffers import POOL, Slab
from promptdb.cache import DTYPE_NAMES, TORCH_DTYPES, PromptCache, layout_of, pooled_empty
from promptdb.errors import CorruptDataError, NonFiniteError
from promptdb.format import KV_BLOB, LOGPROBS_BLOB, Layout
from promptdb.intake import kv_specs
from promptdb.quantise import dequantise, quantise
from promptdb.scores import TokenScores
from promptdb.staging import copy_to_device

if TYPE_CHECKING:
    from promptdb.snapshot import Match, Snapshot
    from promptdb.trie import Step

with warnings.catch_warnings():
    # torch says once per process that views of read-only memory must not be written; views of the memory map never are.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


# Log-probabilities and greedy IDs of a span, as they are stored.
ScoreBytes = tuple[memoryview, memoryview]


def tensor_of(view: TensorView) -> torch.Tensor:
    """Return a tensor over a view's memory, without copying. It must neither be written nor outlive the view."""
    dtype = TORCH_DTYPES.get(view.dtype)
    if dtype is None:
        raise CorruptDataError(f"a tensor of dtype {view.dtype}, which this torch does not have")
    if not len(view.data):
        return torch.empty(view.shape, dtype=dtype)
    return torch.frombuffer(view.data, dtype=dtype).view(view.shape)


def copy_of(view: TensorView, slab: Slab | None = None) -> torch.Tensor:
    """Return a copy of a tensor, for small ones, where waking torch's threads costs more; of many, from a slab."""
    dtype = TORCH_DTYPES.get(view.dtype)
    if dtype is None or not len(view.data):
        return tensor_of(view).clone()
    data = bytearray(view.data) if slab is None else slab.copy(view.data)
    return torch.frombuffer(data, dtype=dtype).view(view.shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the little-endian bytes of a small tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().tobytes()


class KvSource:
    """A cache that spans are encoded from, looked at once: it must not change meanwhile.

    Parameters
    ----------
    first : the first token that a span is encoded from. From a device, all from there on is copied at once.
    """

    def __init__(self, cache: PromptCache, first: int = 0) -> None:
        self.layout = layout_of(cache)
        self.cache, self._first = cache, 0
        self._stacks = cache.stacks(self.layout)
        if self._stacks and self._stacks[0].device.type != "cpu":
            end = cache.get_seq_length()
            self._stacks = [stack[:, :, first:end].cpu() for stack in self._stacks]
            self._first = first

    def copy(self, group: int, start: int, end: int, target: torch.Tensor) -> None:
        """Copy tokens ``[start, end)`` of a group of layers to ``[slots, kv_heads, end - start, head_dim]``."""
        if self._stacks is not None:
            target.copy_(self._stacks[group][:, :, start - self._first : end - self._first])
            return
        for at, slot in enumerate(self.layout[group].slots):
            target[at].copy_(self.cache.slot(slot)[0, :, start:end])


def encode_span(source: KvSource, start: int, end: int, scores: TokenScores, kv_codec: str = "") -> dict[str, Blob]:
    """Return the blobs of tokens ``[start, end)`` of a cache: one copy, into pooled memory.

    Parameters
    ----------
    scores : those of the ``end - start`` tokens.
    kv_codec : that of the root.

    Raises
    ------
    NonFiniteError
        The keys or values hold NaN or infinity.
    """
    layout = source.layout
    specs = kv_specs(layout, end - start, kv_codec)
    plan = plan_blob(specs)
    lease = POOL.lease(plan.size_bytes)
    blob = memoryview(lease).cast("B")
    blob[: len(plan.header)] = plan.header
    tensors = {
        spec.name: torch.frombuffer(blob[at : at + spec.size_bytes], dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape)
        for spec, at in zip(specs, plan.offsets_bytes, strict=True)
    }
    for number, group in enumerate(layout):
        codes = target = tensors[f"kv.{number}"]
        if kv_codec:
            target = pooled_empty(codes.shape, TORCH_DTYPES[group.dtype], codes.device)
        source.copy(number, start, end, target)
        _check_finite(target, number)
        if kv_codec:
            quantise(target, codes, tensors[f"kv.{number}.scale"])
    return {KV_BLOB: blob, LOGPROBS_BLOB: _encode_scores(bytes_of(scores.logprobs), bytes_of(scores.greedy_ids))}


def _encode_scores(logprobs: bytes | memoryview, greedy_ids: bytes | memoryview) -> Blob:
    shape = (len(logprobs) // 4,)
    return build_blob(
        [(TensorSpec("token_logprobs", "F32", shape), logprobs), (TensorSpec("greedy_ids", "I32", shape), greedy_ids)]
    )


def _check_finite(tensor: torch.Tensor, number: int) -> None:
    if not tensor.is_floating_point():
        return
    # The largest magnitude is NaN or infinite if any element is: one pass, nothing allocated.
    numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if not torch.isfinite(torch.stack(torch.aminmax(numbers))).all():
        raise NonFiniteError(
            f"keys or values of group {number} hold NaN or infinity; nothing was stored",
            "check the model's weights and dtype: fp16 overflows where bf16 and fp32 do not",
        )


def encode_logits(logits: torch.Tensor) -> Blob:
    """Return the blob of next-token logits ``[vocabulary]``.

    Raises
    ------
    NonFiniteError
        The logits hold NaN. Infinity is allowed: some models mask tokens so.
    """
    if torch.isnan(logits).any():
        raise NonFiniteError("the logits hold NaN; nothing was stored", "check the model's weights and dtype")
    return build_blob([(TensorSpec("logits", DTYPE_NAMES[logits.dtype], tuple(logits.shape)), bytes_of(logits))])


def trim_blobs(blobs: Mapping[str, bytes | bytearray | memoryview], skip: int) -> dict[str, Blob]:
    """Return the blobs of a span without its first ``skip`` tokens."""
    tensors = []
    for name, view in parse_blob(blobs[KV_BLOB]).items():  # the third dimension of each is that of tokens
        kept = tensor_of(view)[:, :, skip:].contiguous()
        tensors.append((TensorSpec(name, view.dtype, tuple(kept.shape)), bytes_of(kept)))
    scores = parse_blob(blobs[LOGPROBS_BLOB])
    logprobs, greedy_ids = scores["token_logprobs"].data[4 * skip :], scores["greedy_ids"].data[4 * skip :]
    return {KV_BLOB: build_blob(tensors), LOGPROBS_BLOB: _encode_scores(logprobs, greedy_ids)}


def load_cache(
    snapshot: Snapshot, match: Match, num_tokens: int, capacity: int, device: torch.device
) -> tuple[PromptCache, int] | None:
    """Read the first ``num_tokens`` tokens of a match into a fresh cache: one copy, from the map into the cache's
    memory.

    Returns
    -------
    tuple or None
        The cache and the bytes read; None if a span is gone or was stored without keys and values.

    Raises
    ------
    CorruptDataError
        A record or blob does not hold. ``node`` of the error names it.
    """
    if not match.steps or not num_tokens:
        return PromptCache(capacity), 0
    layout = stored_layout(snapshot, match)
    if layout is None:
        return None
    cache = PromptCache.of_layout(layout, num_tokens, capacity, device)
    copies = span_copies(snapshot, match, 0, num_tokens, layout, cache.stacks(layout) or [], 0)
    if copies is None:
        return None
    copy_to_device(copies, device)
    return cache, sum(source.nbytes for _, source in copies)


def stored_layout(snapshot: Snapshot, match: Match) -> Layout | None:
    """Return the layout of a match's first span, or None if it is gone; raises as :func:`load_cache` does."""
    try:
        record = snapshot.record(match.steps[0].node)
    except CorruptDataError as error:
        error.node = match.steps[0].node
        raise
    return None if record is None else record.layout


def span_copies(
    snapshot: Snapshot,
    match: Match,
    start: int,
    end: int,
    layout: Layout,
    stacks: Sequence[torch.Tensor],
    slot: int,
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Return what to copy, (target, source), to have positions ``[start, end)`` of a match in a cache's stacks.

    Parameters
    ----------
    slot : where in the stacks the token at ``start`` goes.

    Returns
    -------
    list or None
        Sources are views of the store and die with the snapshot. None as for :func:`load_cache`, which raises likewise.
    """
    copies = []
    for step in match.steps:
        first, last = max(step.start, start), min(step.start + step.num_tokens, end)
        if first >= last:
            continue
        try:
            record = snapshot.record(step.node)
            tensors = snapshot.blob(step.node, record, KV_BLOB) if record is not None else None
            if record is None or tensors is None:
                return None
            if record.layout != layout:
                raise CorruptDataError("spans of one prompt are laid out differently")
            kv_codec = record.root.kv_codec
            found = _checked(tensors, kv_specs(layout, step.span_tokens, kv_codec))
            for number, stack in enumerate(stacks):
                target = stack[:, :, slot + first - start : slot + last - start]
                kept = slice(first - step.start, last - step.start)
                numbers = found[f"kv.{number}"][:, :, kept]
                if kv_codec:
                    numbers = dequantise(numbers, found[f"kv.{number}.scale"][:, :, kept], target.dtype)
                copies.append((target, numbers))
        except CorruptDataError as error:
            error.node = step.node
            raise
    return copies


def _checked(tensors: Mapping[str, TensorView], specs: Sequence[TensorSpec]) -> dict[str, torch.Tensor]:
    found = {}
    for spec in specs:
        view = tensors.get(spec.name)
        if view is None or (view.dtype, view.shape) != (spec.dtype, spec.shape):
            raise CorruptDataError(f"tensor {spec.name} is missing or has another shape than its record says")
        found[spec.name] = tensor_of(view)
    return found


class ScoreReader:
    """Reads scores of matches from one snapshot: of what several share, each span is read and joined once.

    Not thread safe. Lives as long as the snapshot, and grows with what it has read.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._spans: dict[bytes, ScoreBytes] = {}
        # By the last step of a path: its node tells of all before it.
        self._paths: dict[tuple[bytes, int], tuple[bytearray, bytearray]] = {}

    def read(self, match: Match, num_tokens: int) -> TokenScores | None:
        """Return the scores of the first ``num_tokens`` tokens of a match.

        Returns None, and raises, as :func:`load_cache` does.
        """
        steps = [step for step in match.steps if step.start < num_tokens]
        if not steps:
            return TokenScores.unknown(0)
        before = self._joined(steps[:-1])
        last = None if before is None else self._span(steps[-1])
        if before is None or last is None:
            return None
        used = min(steps[-1].num_tokens, num_tokens - steps[-1].start)
        # Bytes are joined, not tensors: a batch reads thousands of short spans.
        logprobs, greedy_ids = (part + bytes(more[: 4 * used]) for part, more in zip(before, last, strict=True))
        return TokenScores(
            torch.frombuffer(logprobs, dtype=torch.float32), torch.frombuffer(greedy_ids, dtype=torch.int32)
        )

    def _joined(self, steps: Sequence[Step]) -> tuple[bytearray, bytearray] | None:
        """Return the scores of whole steps, one after the other; they must not be written to."""
        if not steps:
            return bytearray(), bytearray()
        key = steps[-1].node, steps[-1].num_tokens
        joined = self._paths.get(key)
        if joined is None:
            joined = bytearray(), bytearray()
            for step in steps:
                found = self._span(step)
                if found is None:
                    return None
                for part, more in zip(joined, found, strict=True):
                    part += more[: 4 * step.num_tokens]
            self._paths[key] = joined
        return joined

    def _span(self, step: Step) -> ScoreBytes | None:
        found = self._spans.get(step.node)
        if found is not None:
            return found
        try:
            record = self._snapshot.record(step.node)
            tensors = self._snapshot.blob(step.node, record, LOGPROBS_BLOB) if record is not None else None
            if tensors is None:
                return None
            found = self._spans[step.node] = _scores_of(tensors, step.span_tokens)
        except CorruptDataError as error:
            error.node = step.node
            raise
        return found


def load_scores(snapshot: Snapshot, match: Match, num_tokens: int) -> TokenScores | None:
    """Return the scores of the first ``num_tokens`` tokens of a match; see :meth:`ScoreReader.read`."""
    return ScoreReader(snapshot).read(match, num_tokens)


def _scores_of(tensors: Mapping[str, TensorView], num_tokens: int) -> ScoreBytes:
    """Return a span's log-probabilities and greedy IDs, 4 bytes each, over the blob's memory."""
    logprobs, greedy_ids = tensors.get("token_logprobs"), tensors.get("greedy_ids")
    if logprobs is None or (logprobs.dtype, logprobs.shape) != ("F32", (num_tokens,)):
        raise CorruptDataError("token_logprobs is missing or has another shape than its record says")
    if greedy_ids is None:  # stored by a version that did not keep them
        return logprobs.data, memoryview(b"\xff" * (4 * num_tokens))
    if (greedy_ids.dtype, greedy_ids.shape) != ("I32", (num_tokens,)):
        raise CorruptDataError("greedy_ids is not I32, one for each token that its record says")
    return logprobs.data, greedy_ids.data
