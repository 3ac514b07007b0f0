"""Who computed this: the digest of a model's content.

A representation may be reused only by a forward pass that would compute the same thing. The rule when in doubt: another
ID (a miss costs time), or :class:`~promptdb.errors.IdentityError` naming what cannot be identified. Never the reverse.

::

    weights_id(model) = H( every module: name, class and its forward, plain attributes,
                           configuration, parameters, buffers, extra state )

Not in the ID, because it is provenance: device, attention implementation, library versions, global switches such as
TF32. Code of torch, transformers, peft and their like is identified by name; any other code by its source.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
import sys
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from promptdb.code_identity import class_id, code_id
from promptdb.errors import IdentityError, InputTypeError
from promptdb.hashing import FieldHasher
from promptdb.placement import kept_aside, weight_of
from promptdb.refusals import refuse_attention, refuse_hooks, refuse_patched

if TYPE_CHECKING:
    import torch

__all__ = ["weights_id"]

# Configuration fields that no forward pass reads, or that choose how and not what to compute. All others count, those
# of a model nobody has heard of too. pad_token_id counts: some forward passes compare input IDs with it.
_CONFIG_IGNORED = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash"),  # where the model was loaded from
        *("transformers_version", "peft_version"),  # provenance
        *("architectures", "auto_map"),  # labels: the class itself is hashed
        *("dtype", "torch_dtype"),  # labels: every tensor carries its own
        *("_attn_implementation", "attn_implementation", "_attn_implementation_internal"),  # which kernel: provenance
        *("_attn_implementation_autoset", "_experts_implementation", "experts_implementation"),
        "_experts_implementation_internal",
        *("use_cache", "return_dict", "output_attentions", "_output_attentions"),  # what is returned, not its value
        "output_hidden_states",
        *("bos_token_id", "eos_token_id"),  # generation and labels only
        *("id2label", "label2id", "problem_type", "num_labels"),  # names of classes
        *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type"),  # peft: labels
        "_post_init_done",
    }
)

# Attributes of modules that are not maths.
_VARS_IGNORED = frozenset(
    {
        "training",  # dropout is refused elsewhere, by train mode
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),  # walked by themselves
        *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
        *("_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        *("_is_hf_initialized", "gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hooks"),
        *("_require_grads_hook", "all_tied_weights_keys", "_tied_weights_keys", "name_or_path", "warnings_issued"),
        *("_tp_plan", "_pp_plan", "_ep_plan", "_fsdp_plan", "_tp_size", "_device_mesh", "hf_device_map"),  # placement
        *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_no_split_modules", "_skip_keys_device_placement"),
        *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_save"),
        *("generation_config", "hf_quantizer", "loss_type", "_loss_function", "kernel_config"),
        "_weight_conversions",  # the loader's notes
        *("_attn_implementation", "_use_kernels", "_compiled_call", "_last_compile_config"),  # which kernel: provenance
        # accelerate: checked with the hooks; its to() and cuda() only refuse to move a dispatched model
        *("forward", "_hf_hook", "_old_forward", "to", "cuda", "npu", "xpu", "mlu", "musa", "sdaa"),
        *("_output_capturing_hooks_installed", "_hooks_installed", "_caches"),
    }
)
_KEYS_IGNORED = frozenset({"device_map", "hf_device_map"})  # placement, in the keyword arguments that peft keeps


def weights_id(model: Any) -> str:
    """Identify a model by all that its forward pass depends on.

    Equal for equal content in any process, on any device, under any attention implementation; different after any
    change of a parameter, buffer (rotary frequencies that dynamic NTK or LongRoPE swapped count), configuration field,
    plain attribute, class, adapter (its weights, scaling, switched on, off or merged) or quantisation.

    Parameters
    ----------
    model : a ``torch.nn.Module``, usually a transformers or peft model, with its weights in memory.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    IdentityError
        A hook, a patched ``forward``, a compiled wrapper, or state that cannot be hashed; weights not in memory.
    InputTypeError
        ``model`` is not a module.

    Notes
    -----
    Cost: reads every byte once (3-4 GB/s on 2 cores); :class:`promptdb.watch.ModelWatch` avoids repeats.
    Thread safe, as long as nobody changes the model meanwhile. A peft model with its adapters switched off has an ID of
    its own: not that with adapters on, nor that of the bare base model. An adapter's name counts, and so does the dtype
    of rotary frequencies: ``model.to(bfloat16)`` rounds them, loading with ``dtype=bfloat16`` does not.
    Limits: methods other than ``forward`` that are patched on a library's class, and versions of libraries, go unseen.
    """
    return Walk(model, contents=True).digest.hex()


class Walk:
    """One pass over a model; used through :func:`weights_id` and :class:`promptdb.watch.ModelWatch`.

    Parameters
    ----------
    model : the module to describe.
    contents : hash the bytes of parameters and buffers; otherwise only their dtype and shape.

    Attributes
    ----------
    digest : 32 bytes.
    tensors : plain tensors met, in order, each once; owned by the model.
    containers : dicts, lists and sets met that the digest depends on: while all hold the same objects, and the tensors
        the same bytes, the digest is the same.
    classes : module classes met.
    """

    def __init__(self, model: Any, *, contents: bool) -> None:
        import torch
        from torch.nn.modules import module as torch_module

        if not isinstance(model, torch.nn.Module):
            raise InputTypeError(f"a {type(model).__name__} is not a torch.nn.Module", "pass the model itself")
        if sys.byteorder != "little":  # tensors are hashed as they lie in memory
            raise IdentityError("this machine is big-endian", "IDs are defined on little-endian machines")
        self.tensors: list[torch.Tensor] = []
        self.containers: list[Any] = []
        self.classes: dict[type[torch.nn.Module], tuple[str, str]] = {}
        self._torch = torch
        self._contents = contents
        self._tensor_digests: dict[int, bytes] = {}
        self._config_digests: dict[int, bytes] = {}
        self._fresh: list[Any] = []  # keeps ids unique while the walk lasts
        self._pinned: torch.Tensor | None = None
        self._hash = FieldHasher("promptdb/weights/1")
        for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
            self.containers.append(hooks)
            refuse_hooks("every module (global)", hooks.values())
        try:
            for name, module in model.named_modules(remove_duplicate=False):
                self._module(name, module)
        except RecursionError:
            raise IdentityError("a module contains itself", "break the cycle") from None
        self.digest = self._hash.digest()

    def _module(self, name: str, module: torch.nn.Module) -> None:
        cls, attributes = type(module), vars(module)
        where = f"{name or 'model'} ({cls.__name__})"
        refuse_patched(where, module)
        self._hash.field("module", name)
        if cls not in self.classes:
            self.classes[cls] = (class_id(cls), code_id(where, cls.forward))
        self._hash.field("class", self.classes[cls][0]).field("forward", self.classes[cls][1])
        self.containers += (attributes, module._modules, module._parameters, module._buffers)
        self.containers += (module._forward_hooks, module._forward_pre_hooks, *kept_aside(module))
        own_state = cls._save_to_state_dict is not self._torch.nn.Module._save_to_state_dict
        for key in sorted(attributes.keys() - _VARS_IGNORED):
            if key.endswith("max_seq_len_cached"):  # what rotary embeddings last saw; its effect is in inv_freq
                continue
            value = attributes[key]
            if own_state and not self._known(value):
                continue  # an opaque object (packed weights) of a module that writes its own state: hashed below
            if key.startswith("_") and _is_bookkeeping(module, value):
                continue
            self._value(f"{where}.{key}", key, value)
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key in sorted(tensors):
                tensor = tensors[key]
                if tensor is not None:
                    tensor = weight_of(f"{where}.{key}", module, key, tensor)
                    self._hash.field(kind, key).field("content", self._tensor(f"{where}.{key}", tensor))
        extra = cls.get_extra_state is not self._torch.nn.Module.get_extra_state
        if own_state or extra:
            self._own_state(where, module)

    def _own_state(self, where: str, module: torch.nn.Module) -> None:
        """Hash what a module writes into a state dict beyond its parameters and buffers, such as packed weights."""
        from collections import OrderedDict

        state: Any = OrderedDict()
        state._metadata = OrderedDict()
        module._save_to_state_dict(state, "", True)
        known = {**module._parameters, **module._buffers}
        contents, self._contents = self._contents, True  # made on the spot: nobody could watch these tensors
        watched, self.tensors = self.tensors, []
        for key in sorted(state):
            if known.get(key) is None:
                self._fresh.append(state[key])
                self._value(f"{where} state {key!r}", f"state:{key}", state[key])
        self._contents, self.tensors = contents, watched

    def _known(self, value: Any) -> bool:
        """Whether ``_value`` can hash ``value`` itself (not asked of what it contains)."""
        plain = (bool, int, float, complex, str, bytes, type(None), list, tuple, dict, set, frozenset, enum.Enum)
        torch = self._torch
        known = (*plain, torch.Tensor, torch.dtype, torch.device, types.FunctionType, types.MethodType)
        return isinstance(value, known) or hasattr(value, "to_dict")

    def _value(self, where: str, tag: str, value: Any) -> None:
        """Feed any value: the number of items goes before the items, so that nesting is unambiguous."""
        torch, field = self._torch, self._hash.field
        if value is None or isinstance(value, (bool, float, bytes)):
            field(tag, value)
        elif isinstance(value, enum.Enum):
            field(tag, f"enum {type(value).__qualname__}.{value.name}")
        elif isinstance(value, str):
            field(tag, value)
        elif isinstance(value, int):
            field(tag, value if -(1 << 63) <= value < 1 << 63 else f"int {value}")
        elif isinstance(value, torch.Tensor):
            field(tag, "tensor").field("content", self._tensor(where, value))
        elif isinstance(value, (list, tuple)):
            if isinstance(value, list):
                self.containers.append(value)
            field(tag, "list").field("items", len(value))  # tuples too: JSON makes lists of them
            for index, item in enumerate(value):
                self._value(f"{where}[{index}]", "item", item)
        elif isinstance(value, Mapping):
            self.containers.append(value)
            kept = ((str(key), item) for key, item in value.items() if key not in _KEYS_IGNORED)
            items = sorted(kept, key=lambda pair: pair[0])  # keys as text, as JSON has no others
            field(tag, "dict").field("items", len(items))
            for key, item in items:
                field("key", key)
                self._value(f"{where}[{key!r}]", "value", item)
        elif isinstance(value, (set, frozenset)):
            self.containers.append(value)
            field(tag, "set").field("items", len(value))
            for text in sorted(f"{type(item).__name__} {item}" for item in value):
                field("item", text)
        elif isinstance(value, torch.dtype):
            field(tag, f"dtype {value}")
        elif isinstance(value, torch.device):
            field(tag, "device")
        elif isinstance(value, complex):
            field(tag, "complex").field("real", value.real).field("imag", value.imag)
        elif isinstance(value, functools.partial):
            field(tag, "partial")
            self._value(where, "function", value.func)
            self._value(where, "arguments", value.args)
            self._value(where, "keywords", value.keywords)
        elif isinstance(value, type):
            field(tag, f"type {class_id(value)}")
        elif callable(getattr(value, "to_dict", None)):
            field(tag, "config").field("content", self._config(where, value))
        elif isinstance(value, types.MethodType) and isinstance(value.__self__, torch.nn.Module):
            # peft keeps some of the model's own methods under other names.
            field(tag, "method").field("code", code_id(where, value.__func__))
        elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            field(tag, "function").field("code", code_id(where, value))
            for part in ("__defaults__", "__kwdefaults__"):
                self._value(f"{where}{part}", part, getattr(value, part, None))
            for cell in getattr(value, "__closure__", None) or ():
                self._value(f"{where} closure", "cell", cell.cell_contents)
        elif dataclasses.is_dataclass(value):
            field(tag, f"dataclass {class_id(type(value))}")
            self._value(where, "fields", vars(value))
        elif callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ():  # a NumPy scalar
            self._value(where, tag, value.item())
        else:
            raise IdentityError(
                f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be hashed",
                "remove the attribute, or keep its state in parameters, buffers or get_extra_state()",
            )

    def _config(self, where: str, config: Any) -> bytes:
        """Digest a configuration object; modules share one, so each is hashed once."""
        known = self._config_digests.get(id(config))
        if known is None:
            refuse_attention(where, config)
            outer, self._hash = self._hash, FieldHasher("promptdb/config/1")
            self._hash.field("class", type(config).__name__)
            ours, self.containers = self.containers, []
            self._value(where, "fields", _without_ignored(config.to_dict()))
            self.containers = ours  # to_dict() copies: follow the originals instead
            self._follow(config)
            known, self._hash = self._hash.digest(), outer
            self._config_digests[id(config)] = known
        return known

    def _follow(self, value: Any) -> None:
        """Note the containers that a configuration's fields depend on."""
        if callable(getattr(value, "to_dict", None)):
            value = vars(value)
        if isinstance(value, (dict, list, set)):
            self.containers.append(value)
            for item in list(value.values()) if isinstance(value, dict) else list(value):
                self._follow(item)

    def _tensor(self, where: str, tensor: torch.Tensor) -> bytes:
        """Digest of a tensor's dtype, shape and bytes; tied tensors are read once."""
        known = self._tensor_digests.get(id(tensor))
        if known is not None:
            return known
        h = FieldHasher("promptdb/tensor/1")
        h.field("dtype", str(tensor.dtype)).field("shape", ",".join(map(str, tensor.shape)))
        if hasattr(type(tensor), "__tensor_flatten__"):  # a wrapper, such as torchao's: hash what it wraps
            names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            h.field("class", class_id(type(tensor)))
            outer, self._hash = self._hash, h
            self._value(f"{where} context", "context", context)
            self._hash = outer
            for name in names:
                h.field("inner", name).field("content", self._tensor(f"{where}.{name}", getattr(tensor, name)))
        elif tensor.is_quantized:
            self._quantised(where, tensor, h)
        else:
            if tensor.is_meta:
                raise IdentityError(f"{where} is not in memory (device meta)", "load the weights first")
            if tensor.layout != self._torch.strided:
                raise IdentityError(f"{where} has layout {tensor.layout}", "convert it with to_dense()")
            self.tensors.append(tensor)
            if self._contents:
                h.field("bytes", self._bytes(where, tensor))
        digest = self._tensor_digests[id(tensor)] = h.digest()
        return digest

    def _quantised(self, where: str, tensor: torch.Tensor, h: FieldHasher) -> None:
        scheme = tensor.qscheme()
        h.field("qscheme", str(scheme))
        per_tensor = scheme in (self._torch.per_tensor_affine, self._torch.per_tensor_symmetric)
        if per_tensor:
            h.field("scale", float(tensor.q_scale())).field("zero", int(tensor.q_zero_point()))
            parts = [tensor.int_repr()]
        else:
            h.field("axis", int(tensor.q_per_channel_axis()))
            parts = [tensor.int_repr(), tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        for part in parts:  # copies: hashed whatever the walk is for, as nobody could watch them
            h.field("part", f"{part.dtype} {tuple(part.shape)}").field("bytes", self._bytes(where, part))

    def _bytes(self, where: str, tensor: torch.Tensor) -> bytes:
        """BLAKE3 of the elements in row-major order, read in place where they lie in memory that way."""
        torch = self._torch
        try:
            flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        except RuntimeError as error:
            raise IdentityError(f"{where}: the bytes of {tensor.dtype} cannot be read: {error}") from error
        size = flat.numel()
        # Threads cost more than they bring below a megabyte or so.
        hasher = blake3(max_threads=blake3.AUTO if size > 1 << 20 else 1)
        if flat.device.type == "cpu":
            # From the address, as Tensor.numpy() would forbid the owner to resize the tensor's storage from then on.
            if size:
                hasher.update(memoryview((ctypes.c_char * size).from_address(flat.data_ptr())).cast("B"))
            return bytes(hasher.digest())
        step = 64 << 20  # bounded host memory, whatever the tensor's size
        if self._pinned is None:
            self._pinned = torch.empty(step, dtype=torch.uint8, pin_memory=flat.device.type == "cuda")
        for start in range(0, size, step):
            part = self._pinned[: min(step, size - start)]
            part.copy_(flat[start : start + step])
            hasher.update(part.numpy().data)
        return bytes(hasher.digest())


def _is_bookkeeping(module: torch.nn.Module, value: Any) -> bool:
    """Whether a private attribute holds objects of transformers' own, such as the loader's notes on a model."""
    import torch

    items = value if isinstance(value, (list, tuple)) else (value,)
    return type(module).__module__.startswith("transformers.") and any(
        type(item).__module__.startswith("transformers.")
        and not isinstance(item, (torch.nn.Module, torch.Tensor, enum.Enum))
        and not hasattr(item, "to_dict")
        for item in items
    )


def _without_ignored(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Drop fields that are not maths, in nested configurations too."""
    return {
        key: _without_ignored(value) if isinstance(value, Mapping) else value
        for key, value in fields.items()
        if key not in _CONFIG_IGNORED
    }
