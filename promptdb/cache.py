"""Model-ready caches that append in place.

A :class:`PromptCache` is a ``DynamicCache`` whose layers keep all tokens (sliding windows are applied by the attention
mask, as transformers does for any full layer) and append in place, into memory with room to spare, instead of
concatenating: copying 1,000 tokens of a GPT-2 into fresh memory for every forward pass costs as much as computing ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from promptdb.blobs import DTYPE_BYTES
from promptdb.buffers import POOL
from promptdb.errors import UnsupportedModelError
from promptdb.format import Group, Layout

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


def _same_place(view: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Return whether ``view`` is the first tokens of ``buffer``; the address of an empty view tells nothing."""
    return (
        view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        and view.storage_offset() == buffer.storage_offset()
        and view.stride() == buffer.stride()
    )


def _begins_like(view: torch.Tensor, buffer: torch.Tensor) -> bool:
    return view.data_ptr() == buffer.data_ptr()


def _fits(states: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Return whether states can be written into a buffer as they are, at some token."""
    new, there = states.shape, buffer.shape
    return states.dtype == buffer.dtype and new[:2] == there[:2] and new[3:] == there[3:]


class PromptLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that keeps all tokens and appends in place while there is room.

    ``keys`` and ``values`` are views ``[1, kv_heads, tokens, head_dim]`` of buffers with room for ``capacity`` tokens.
    Operations of transformers that replace them (beam reordering, repeating) work: the layer then concatenates, as its
    parent does.

    Attributes
    ----------
    before_update : called whenever the model is about to append, by which one can tell how far a pass has come.
    """

    # Of the class: layers that were pickled before there were these lack them.
    before_update: Callable[[], None] | None = None
    _views: tuple[torch.Tensor, torch.Tensor] | None = None  # of the buffers, as last made

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self._capacity = capacity
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._num_written = 0

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles: they are in no pass, and their tensors may have been parted from their buffers.
        return {**self.__dict__, "before_update": None, "_views": None}

    def fill(
        self,
        buffers: tuple[torch.Tensor, torch.Tensor],
        num_tokens: int,
        filled: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Take over buffers whose first ``num_tokens`` tokens are filled; ``filled``: views of those, if at hand."""
        keys, values = buffers
        self.dtype, self.device = keys.dtype, keys.device
        self._buffers = buffers
        self._capacity = keys.shape[-2]
        self._views = filled or (keys[:, :, :num_tokens], values[:, :, :num_tokens])
        self.keys, self.values = self._views
        self._num_written = num_tokens
        self.is_initialized = True

    def room(self) -> int:
        """Return how many tokens fit in place, or 0 if this layer does not append in place."""
        buffers = self._owned()
        return 0 if buffers is None else buffers[0].shape[-2]

    def rewind(self, num_tokens: int) -> None:
        """Forget all but the first tokens of a layer that appends in place; the next are written over the rest."""
        assert self._buffers is not None
        assert num_tokens <= self._num_written
        self.fill(self._buffers, num_tokens)

    def _owned(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the buffers, or None if keys and values are not, or no longer, views of them."""
        buffers = self._buffers
        if buffers is None or self.keys is None:
            return None
        views = self._views
        is_as_left = views is not None and self.keys is views[0] and self.values is views[1]
        # Unless their memory was replaced. Anything else is looked at more closely.
        if is_as_left and all(map(_begins_like, views or (), buffers)):
            return buffers
        is_there = _same_place(self.keys, buffers[0]) and _same_place(self.values, buffers[1])
        return buffers if is_there and self.keys.shape[0] == 1 else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values. See ``DynamicLayer.update``.

        Raises
        ------
        UnsupportedModelError
            The model's keys or values have another dtype or shape than those that were loaded: torch would convert them
            without a word.

        Notes
        -----
        Cost beside the copy: few operations, as each takes 20 microseconds when a pass over a model's weights has just
        emptied the CPU's caches.
        """
        if self.before_update is not None:
            self.before_update()
        past, new = self.get_seq_length(), key_states.shape[-2]
        buffers = self._owned()
        if buffers and not (_fits(key_states, buffers[0]) and _fits(value_states, buffers[1])):
            if past:
                raise UnsupportedModelError(
                    f"the model computes {key_states.dtype} {tuple(key_states.shape)} after a cache of "
                    f"{self.keys.dtype} {tuple(self.keys.shape)}",
                    "run it without autocast, as when the cache was filled",
                )
            self.reset()
            buffers = None
        if not self.is_initialized and key_states.shape[0] == 1 and self._capacity:
            room = max(self._capacity, new)
            keys, values = (
                pooled_empty((1, states.shape[1], room, states.shape[3]), states.dtype, states.device)
                for states in (key_states, value_states)
            )
            buffers = keys, values
            self.fill(buffers, 0)
        if buffers is None or torch.is_grad_enabled():
            self._buffers = self._views = None
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        # After a crop somebody may still look at the tokens that were cut off: they are not written over.
        if past < self._num_written or past + new > buffers[0].shape[-2]:
            buffers = self._grow(buffers, past + new)
        keys, values = buffers
        keys.narrow(2, past, new).copy_(key_states)
        values.narrow(2, past, new).copy_(value_states)
        self._views = keys.narrow(2, 0, past + new), values.narrow(2, 0, past + new)
        self.keys, self.values = self._views
        self._num_written = past + new
        return self._views

    def _grow(self, buffers: tuple[torch.Tensor, torch.Tensor], needed: int) -> tuple[torch.Tensor, torch.Tensor]:
        past = self.keys.shape[-2]
        room = max(needed, past + past // 2 + 64)

        def larger(buffer: torch.Tensor) -> torch.Tensor:
            grown = pooled_empty((1, buffer.shape[1], room, buffer.shape[3]), buffer.dtype, buffer.device)
            grown[:, :, :past].copy_(buffer[:, :, :past])
            return grown

        grown = larger(buffers[0]), larger(buffers[1])
        self.fill(grown, past)
        return grown

    def reset(self) -> None:
        """Forget everything."""
        self._buffers = self._views = None
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
        self._stacks: list[torch.Tensor] = []
        if layers is not None:
            self.layers = layers
            self.layer_class_to_replicate = None
        else:
            self.layer_class_to_replicate = lambda: PromptLayer(capacity)

    @classmethod
    def of_layout(cls, layout: Layout, num_tokens: int, capacity: int, device: torch.device) -> PromptCache:
        """Return a cache with room for ``capacity`` tokens, the first ``num_tokens`` of which are yet to be written.

        Groups of layers of one shape share one tensor, so that a span is one copy: see :meth:`stacks`.
        """
        shapes = [(len(group.slots), group.kv_heads, capacity, group.head_dim) for group in layout]
        stacks = [
            pooled_empty(shape, TORCH_DTYPES[group.dtype], device) for shape, group in zip(shapes, layout, strict=True)
        ]
        # Views of all slots at once: one at a time they would take longer than everything else here.
        slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for group, stack in zip(layout, stacks, strict=True):
            each = stack.unsqueeze(1)
            filled = each.narrow(3, 0, num_tokens).unbind(0)
            slots.update(zip(group.slots, zip(each.unbind(0), filled, strict=True), strict=True))
        layers = [PromptLayer(capacity) for _ in range(max(slots, default=-1) // 2 + 1)]
        for number, layer in enumerate(layers):
            if 2 * number in slots:
                (keys, kept_keys), (values, kept_values) = slots[2 * number], slots[2 * number + 1]
                layer.fill((keys, values), num_tokens, (kept_keys, kept_values))
        cache = cls(capacity, layers)
        cache._stacks = stacks
        return cache

    def stacks(self, layout: Layout) -> list[torch.Tensor] | None:
        """Return the tensors ``[slots, kv_heads, capacity, head_dim]`` that all layers live in, one per group.

        None if there are none, or if a layer has moved out of them.
        """
        if len(self._stacks) != len(layout):
            return None
        for group, stack in zip(layout, self._stacks, strict=True):
            memory, (first, *strides) = stack.untyped_storage().data_ptr(), stack.stride()
            offset = stack.storage_offset()
            for slot in group.slots:
                view = self.slot(slot)
                same = view.storage_offset() == offset and [*view.stride()[1:]] == strides
                if not same or view.untyped_storage().data_ptr() != memory:
                    return None
                offset += first
        return self._stacks

    def room(self) -> int:
        """Return how many tokens fit in place; 0 where a layer concatenates."""
        return min((layer.room() for layer in self.layers if layer.is_initialized), default=0)

    def rewind(self, num_tokens: int) -> None:
        """Forget all but the first tokens of a cache that has room.

        The next tokens are written over what was forgotten: only for those who know that nobody else has seen any of
        the cache's tensors. If it is interrupted, the cache is of no use.
        """
        for layer in self.layers:
            if layer.is_initialized:
                layer.rewind(num_tokens)

    def slot(self, slot: int) -> torch.Tensor:
        """Return keys (even slots) or values (odd ones) of layer ``slot // 2``, ``[1, kv_heads, tokens, head_dim]``."""
        layer = self.layers[slot // 2]
        states: torch.Tensor = layer.values if slot % 2 else layer.keys
        return states

    def copy(self, num_tokens: int, capacity: int) -> PromptCache:
        """Return an independent cache with the first ``num_tokens`` tokens of this one."""
        layout = layout_of(self)
        device = next((layer.device for layer in self.layers if layer.is_initialized), torch.device("cpu"))
        fresh = PromptCache.of_layout(layout, num_tokens, max(capacity, num_tokens), device)
        stacks = self.stacks(layout)
        for number, group in enumerate(layout):
            if stacks is not None:
                fresh._stacks[number][:, :, :num_tokens].copy_(stacks[number][:, :, :num_tokens])
                continue
            for slot in group.slots:
                fresh.slot(slot).copy_(self.slot(slot)[:, :, :num_tokens])
        return fresh


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


def bytes_per_token(layout: Layout) -> int:
    """Return the bytes of keys and values that one token takes."""
    return sum(len(group.slots) * group.kv_heads * group.head_dim * DTYPE_BYTES[group.dtype] for group in layout)
