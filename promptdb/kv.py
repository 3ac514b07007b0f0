"""Between stored spans and the caches of transformers.

A cache made here is a :class:`PromptCache`: a ``DynamicCache`` whose layers keep all tokens (sliding windows are
applied by the attention mask, as transformers does for any full layer) and append in place, into memory with room to
spare, instead of concatenating. Copying 1,000 tokens of a GPT-2 into fresh memory for every forward pass costs as much
as computing ten.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from promptdb.blobs import DTYPE_BYTES, TensorSpec, TensorView, build_blob, parse_blob, plan_blob
from promptdb.buffers import POOL
from promptdb.errors import CorruptDataError, NonFiniteError, UnsupportedModelError
from promptdb.format import KV_BLOB, LOGPROBS_BLOB, Group, Layout
from promptdb.staging import copy_to_device

if TYPE_CHECKING:
    from promptdb.snapshot import Match, Snapshot

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

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


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the little-endian bytes of a small tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().tobytes()


def pooled_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised tensor; on the CPU in memory that was in use before, where there is some."""
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)  # torch pools device memory itself
    count = 1
    for size in shape:
        count *= size
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(POOL.lease(count * dtype.itemsize), dtype=dtype).view(tuple(shape))


class PromptLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that keeps all tokens and appends in place while there is room.

    ``keys`` and ``values`` are views ``[1, kv_heads, tokens, head_dim]`` of buffers with room for ``capacity`` tokens.
    Operations of transformers that replace them (beam reordering, repeating) work: the layer then concatenates, as its
    parent does.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self._capacity = capacity
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def fill(self, keys: torch.Tensor, values: torch.Tensor, num_tokens: int) -> None:
        """Take over buffers whose first ``num_tokens`` tokens are filled."""
        self.dtype, self.device = keys.dtype, keys.device
        self._buffers = (keys, values)
        self._capacity = keys.shape[-2]
        self.keys, self.values = keys[:, :, :num_tokens], values[:, :, :num_tokens]
        self.is_initialized = True

    def _owns(self) -> bool:
        return (
            self._buffers is not None
            and self.keys is not None
            and self.keys.data_ptr() == self._buffers[0].data_ptr()
            and self.values.data_ptr() == self._buffers[1].data_ptr()
            and self.keys.stride() == self._buffers[0].stride()
            and self.keys.shape[0] == 1
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values. See ``DynamicLayer.update``."""
        new = key_states.shape[-2]
        if not self.is_initialized and key_states.shape[0] == 1 and self._capacity:
            room = max(self._capacity, new)
            buffers = [
                pooled_empty((1, states.shape[1], room, states.shape[3]), states.dtype, states.device)
                for states in (key_states, value_states)
            ]
            self.fill(buffers[0], buffers[1], 0)
        if not self._owns() or torch.is_grad_enabled():
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        assert self._buffers is not None
        past = self.keys.shape[-2]
        if past + new > self._buffers[0].shape[-2]:
            self._grow(past + new)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, past : past + new].copy_(states)
        self.keys, self.values = (buffer[:, :, : past + new] for buffer in self._buffers)
        return self.keys, self.values

    def _grow(self, needed: int) -> None:
        past = self.keys.shape[-2]
        grown = []
        for buffer in self._buffers or ():
            room = max(needed, past + past // 2 + 64)
            larger = pooled_empty((1, buffer.shape[1], room, buffer.shape[3]), buffer.dtype, buffer.device)
            larger[:, :, :past].copy_(buffer[:, :, :past])
            grown.append(larger)
        self.fill(grown[0], grown[1], past)

    def reset(self) -> None:
        """Forget everything."""
        self._buffers = None
        super().reset()


class PromptCache(DynamicCache):  # type: ignore[misc]
    """A model-ready cache. Belongs to whoever received it; transformers changes it in place.

    Parameters
    ----------
    capacity : tokens that fit before a layer has to move to larger memory.
    layers : filled layers; without them, layers appear as the model fills them.
    """

    def __init__(self, capacity: int, layers: list[PromptLayer] | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        if layers is not None:
            self.layers = layers
            self.layer_class_to_replicate = None
        else:
            self.layer_class_to_replicate = lambda: PromptLayer(capacity)

    def copy(self, num_tokens: int, capacity: int) -> PromptCache:
        """Return an independent cache with the first ``num_tokens`` tokens of this one."""
        layers = []
        for layer in self.layers:
            fresh = PromptLayer(capacity)
            if layer.is_initialized:
                buffers = []
                for states in (layer.keys, layer.values):
                    shape = (1, states.shape[1], max(capacity, num_tokens), states.shape[3])
                    buffer = pooled_empty(shape, states.dtype, states.device)
                    buffer[:, :, :num_tokens].copy_(states[:, :, :num_tokens])
                    buffers.append(buffer)
                fresh.fill(buffers[0], buffers[1], num_tokens)
            layers.append(fresh)
        return PromptCache(capacity, layers)


def layout_of(cache: PromptCache) -> Layout:
    """Return how the cache's keys and values are grouped when they are stored: slots of equal shape together.

    Raises
    ------
    UnsupportedModelError
        A layer is of a class whose state is more than keys and values, or has no batch of one.
    """
    groups: dict[tuple[int, int, str], list[int]] = {}
    for number, layer in enumerate(cache.layers):
        if type(layer) is not PromptLayer:
            raise UnsupportedModelError(f"cache layer {number} is a {type(layer).__name__}, which cannot be stored")
        if not layer.is_initialized:
            continue  # this layer shares another's keys and values
        for slot, states in ((2 * number, layer.keys), (2 * number + 1, layer.values)):
            if states.dim() != 4 or states.shape[0] != 1 or states.dtype not in DTYPE_NAMES:
                raise UnsupportedModelError(f"cache layer {number} holds {states.dtype} {tuple(states.shape)}")
            groups.setdefault((states.shape[1], states.shape[3], DTYPE_NAMES[states.dtype]), []).append(slot)
    return tuple(Group(tuple(slots), heads, dim, dtype) for (heads, dim, dtype), slots in groups.items())


def _slot(cache: PromptCache, slot: int) -> torch.Tensor:
    layer = cache.layers[slot // 2]
    states: torch.Tensor = layer.values if slot % 2 else layer.keys
    return states


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
    for number, (group, spec, offset) in enumerate(zip(layout, specs, plan.offsets_bytes, strict=True)):
        data = blob[offset : offset + spec.size_bytes]
        target = torch.frombuffer(data, dtype=TORCH_DTYPES[group.dtype]).view(spec.shape)
        for at, slot in enumerate(group.slots):
            target[at].copy_(_slot(cache, slot)[0, :, start:end])
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
    buffers: list[torch.Tensor] = []
    layout: Layout | None = None
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
            if layout is None:
                layout = record.layout
                for group in layout:
                    shape = (len(group.slots), group.kv_heads, capacity, group.head_dim)
                    buffers.append(pooled_empty(shape, TORCH_DTYPES[group.dtype], device))
            if record.layout != layout:
                raise CorruptDataError("spans of one prompt are laid out differently")
            for number, (group, buffer) in enumerate(zip(layout, buffers, strict=True)):
                view = tensors.get(f"kv.{number}")
                if view is None or view.shape != group.span_shape(step.span_tokens) or view.dtype != group.dtype:
                    raise CorruptDataError(f"tensor kv.{number} is missing or has another shape than its record says")
                size_bytes += len(view.data) * used // step.span_tokens
                copies.append((buffer[:, :, step.start : step.start + used], tensor_of(view)[:, :, :used]))
        except CorruptDataError as error:
            error.node = step.node
            raise
    copy_to_device(copies, device)
    if layout is None:
        return PromptCache(capacity), 0
    return PromptCache(capacity, _layers(layout, buffers, num_tokens, capacity)), size_bytes


def _layers(layout: Layout, buffers: Sequence[torch.Tensor], num_tokens: int, capacity: int) -> list[PromptLayer]:
    slots = {
        slot: buffer[at].unsqueeze(0)
        for group, buffer in zip(layout, buffers, strict=True)
        for at, slot in enumerate(group.slots)
    }
    layers = [PromptLayer(capacity) for _ in range(max(slots) // 2 + 1)]
    for number, layer in enumerate(layers):
        if 2 * number in slots:
            layer.fill(slots[2 * number], slots[2 * number + 1], num_tokens)
    return layers


def bytes_per_token(layout: Layout) -> int:
    """Return the bytes of keys and values that one token takes."""
    return sum(len(group.slots) * group.kv_heads * group.head_dim * DTYPE_BYTES[group.dtype] for group in layout)


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
