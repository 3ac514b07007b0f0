"""Between stored spans and model-ready caches: one copy each way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from promptdb.blobs import TensorSpec, TensorView, build_blob, parse_blob, plan_blob
from promptdb.buffers import POOL
from promptdb.cache import DTYPE_NAMES, TORCH_DTYPES, PromptCache
from promptdb.errors import CorruptDataError, NonFiniteError
from promptdb.format import KV_BLOB, LOGPROBS_BLOB, Layout
from promptdb.staging import copy_to_device

if TYPE_CHECKING:
    from promptdb.snapshot import Match, Snapshot

with warnings.catch_warnings():
    # torch says once per process that views of read-only memory must not be written; views of the memory map never are.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def tensor_of(view: TensorView) -> torch.Tensor:
    """Return a tensor over a view's memory, without copying. It must neither be written nor outlive the view."""
    dtype = TORCH_DTYPES.get(view.dtype)
    if dtype is None:
        raise CorruptDataError(f"a tensor of dtype {view.dtype}, which this torch does not have")
    if not len(view.data):
        return torch.empty(view.shape, dtype=dtype)
    return torch.frombuffer(view.data, dtype=dtype).view(view.shape)


def copy_of(view: TensorView) -> torch.Tensor:
    """Return a tensor of its own with a view's content: for small ones, where waking torch's threads costs more."""
    dtype = TORCH_DTYPES.get(view.dtype)
    if dtype is None or not len(view.data):
        return tensor_of(view).clone()
    return torch.frombuffer(bytearray(view.data), dtype=dtype).view(view.shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the little-endian bytes of a small tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().tobytes()


def encode_span(
    cache: PromptCache, layout: Layout, start: int, end: int, logprobs: torch.Tensor
) -> dict[str, memoryview | bytearray]:
    """Return the blobs of positions ``[start, end)``: one copy, from the cache into pooled memory.

    Parameters
    ----------
    logprobs : ``[end - start]`` float32: log-probability of each token given those before it, in nats; NaN for the
        prompt's first.

    Raises
    ------
    NonFiniteError
        The keys or values hold NaN or infinity.
    """
    tokens = end - start
    specs = [TensorSpec(f"kv.{number}", group.dtype, group.span_shape(tokens)) for number, group in enumerate(layout)]
    plan = plan_blob(specs)
    lease = POOL.lease(plan.size_bytes)
    blob = memoryview(lease).cast("B")
    blob[: len(plan.header)] = plan.header
    stacks = cache.stacks(layout)
    for number, (group, spec, offset) in enumerate(zip(layout, specs, plan.offsets_bytes, strict=True)):
        data = blob[offset : offset + spec.size_bytes]
        target = torch.frombuffer(data, dtype=TORCH_DTYPES[group.dtype]).view(spec.shape)
        if stacks is not None:
            target.copy_(stacks[number][:, :, start:end])
        else:
            for at, slot in enumerate(group.slots):
                target[at].copy_(cache.slot(slot)[0, :, start:end])
        _check_finite(target, number)
    values = bytes_of(logprobs.to(torch.float32))
    return {
        KV_BLOB: blob,
        LOGPROBS_BLOB: build_blob([(TensorSpec("token_logprobs", "F32", (tokens,)), values)]),
    }


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


def encode_logits(logits: torch.Tensor) -> bytearray:
    """Return the blob of next-token logits ``[vocabulary]``.

    Raises
    ------
    NonFiniteError
        The logits hold NaN. Infinity is allowed: some models mask tokens so.
    """
    if torch.isnan(logits).any():
        raise NonFiniteError("the logits hold NaN; nothing was stored", "check the model's weights and dtype")
    return build_blob([(TensorSpec("logits", DTYPE_NAMES[logits.dtype], tuple(logits.shape)), bytes_of(logits))])


def trim_blobs(
    blobs: Mapping[str, bytes | bytearray | memoryview], layout: Layout, skip: int
) -> dict[str, memoryview | bytearray]:
    """Return the blobs of a span without its first ``skip`` tokens."""
    kv = parse_blob(blobs[KV_BLOB])
    tokens = kv["kv.0"].shape[2] - skip if layout else 0
    tensors = []
    for number, group in enumerate(layout):
        kept = tensor_of(kv[f"kv.{number}"])[:, :, skip:].contiguous()
        tensors.append((TensorSpec(f"kv.{number}", group.dtype, group.span_shape(tokens)), bytes_of(kept)))
    logprobs = parse_blob(blobs[LOGPROBS_BLOB])["token_logprobs"].data[4 * skip :]
    spec = TensorSpec("token_logprobs", "F32", (len(logprobs) // 4,))
    return {KV_BLOB: build_blob(tensors), LOGPROBS_BLOB: build_blob([(spec, logprobs)])}


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
    cache: PromptCache | None = None
    layout: Layout = ()
    size_bytes = 0
    copies = []
    for step in match.steps:
        used = min(step.num_tokens, num_tokens - step.start)
        if used <= 0:
            break
        try:
            record = snapshot.record(step.node)
            tensors = snapshot.blob(step.node, record, KV_BLOB) if record is not None else None
            if record is None or tensors is None:
                return None
            if cache is None:
                layout = record.layout
                cache = PromptCache.of_layout(layout, num_tokens, capacity, device)
            if record.layout != layout:
                raise CorruptDataError("spans of one prompt are laid out differently")
            for number, (group, stack) in enumerate(zip(layout, cache.stacks(layout) or (), strict=True)):
                view = tensors.get(f"kv.{number}")
                if view is None or view.shape != group.span_shape(step.span_tokens) or view.dtype != group.dtype:
                    raise CorruptDataError(f"tensor kv.{number} is missing or has another shape than its record says")
                size_bytes += len(view.data) * used // step.span_tokens
                copies.append((stack[:, :, step.start : step.start + used], tensor_of(view)[:, :, :used]))
        except CorruptDataError as error:
            error.node = step.node
            raise
    copy_to_device(copies, device)
    return cache or PromptCache(capacity), size_bytes


def load_logprobs(snapshot: Snapshot, match: Match, num_tokens: int) -> torch.Tensor | None:
    """Return the log-probabilities of the first ``num_tokens`` tokens of a match, ``[num_tokens]`` float32, NaN first.

    Returns None, and raises, as :func:`load_cache` does.
    """
    found = torch.empty(num_tokens, dtype=torch.float32)
    for step in match.steps:
        used = min(step.num_tokens, num_tokens - step.start)
        if used <= 0:
            break
        try:
            record = snapshot.record(step.node)
            tensors = snapshot.blob(step.node, record, LOGPROBS_BLOB) if record is not None else None
            if tensors is None:
                return None
            view = tensors.get("token_logprobs")
            if view is None or view.dtype != "F32" or view.shape != (step.span_tokens,):
                raise CorruptDataError("token_logprobs is missing or has another shape than its record says")
        except CorruptDataError as error:
            error.node = step.node
            raise
        found[step.start : step.start + used] = tensor_of(view)[:used]
    return found
