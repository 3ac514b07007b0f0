"""Who computed this: digests of a model's and of a tokenizer's content.

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
import json
import struct
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from promptdb.errors import IdentityError, InputTypeError

if TYPE_CHECKING:
    import torch

__all__ = ["FieldHasher", "tokenizer_id", "weights_id"]

IDENTIFIED = "__promptdb_identified__"
"""A hook with this attribute set true is accounted for elsewhere (by an intervention ID), and is not refused."""

_LIBRARIES = frozenset(
    {"accelerate", "bitsandbytes", "builtins", "peft", "promptdb", "torch", "torchao", "transformers"}
)

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


class FieldHasher:
    """BLAKE3 over tagged, length-prefixed fields, so that no two sequences of fields share their bytes.

    A field is ``len(tag) | tag | type | len(value) | value``; lengths are unsigned 64-bit little-endian, ``type`` is
    one byte: ``b`` bytes, ``s`` UTF-8 text, ``i`` signed 64-bit little-endian, ``f`` IEEE 754 binary64 little-endian,
    ``t`` boolean, ``n`` None. The first field has tag ``domain`` and holds the domain.

    Parameters
    ----------
    domain : what is hashed and in which version of its layout; digests of different domains never meet.

    Notes
    -----
    Pure; about 1 µs a field. Not thread safe: one hasher, one thread.
    """

    __slots__ = ("_hash",)

    def __init__(self, domain: str) -> None:
        self._hash = blake3()
        self.field("domain", domain)

    def field(self, tag: str, value: bytes | str | int | float | bool | None) -> FieldHasher:
        """Add one field and return the hasher.

        Raises
        ------
        InputTypeError
            ``value`` has none of the types above.
        OverflowError
            ``value`` is an integer outside [-2**63, 2**63).
        """
        if isinstance(value, bytes):
            kind, raw = b"b", value
        elif isinstance(value, str):
            kind, raw = b"s", value.encode()
        elif isinstance(value, bool):  # before int, of which it is a subclass
            kind, raw = b"t", b"\x01" if value else b"\x00"
        elif isinstance(value, int):
            kind, raw = b"i", value.to_bytes(8, "little", signed=True)
        elif isinstance(value, float):
            kind, raw = b"f", struct.pack("<d", value)
        elif value is None:
            kind, raw = b"n", b""
        else:
            raise InputTypeError(f"field {tag!r}: cannot hash a {type(value).__name__}", "bytes, str, int, float, bool")
        name = tag.encode()
        self._hash.update(struct.pack("<Q", len(name)) + name + kind + struct.pack("<Q", len(raw)) + raw)
        return self

    def digest(self) -> bytes:
        """Return the 32-byte digest of the fields so far; more may follow."""
        return bytes(self._hash.digest())


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
            _refuse_hooks("every module (global)", hooks.values())
        try:
            for name, module in model.named_modules(remove_duplicate=False):
                self._module(name, module)
        except RecursionError:
            raise IdentityError("a module contains itself", "break the cycle") from None
        self.digest = self._hash.digest()

    def _module(self, name: str, module: torch.nn.Module) -> None:
        cls, attributes = type(module), vars(module)
        where = f"{name or 'model'} ({cls.__name__})"
        _refuse_patched(where, module)
        self._hash.field("module", name)
        if cls not in self.classes:
            self.classes[cls] = (_class_id(cls), _code_id(where, cls.forward))
        self._hash.field("class", self.classes[cls][0]).field("forward", self.classes[cls][1])
        self.containers += (attributes, module._modules, module._parameters, module._buffers)
        self.containers += (module._forward_hooks, module._forward_pre_hooks)
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
        return isinstance(value, (*plain, torch.Tensor, torch.dtype, torch.device, types.FunctionType)) or hasattr(
            value, "to_dict"
        )

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
            field(tag, f"type {_class_id(value)}")
        elif callable(getattr(value, "to_dict", None)):
            field(tag, "config").field("content", self._config(where, value))
        elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            field(tag, "function").field("code", _code_id(where, value))
            for part in ("__defaults__", "__kwdefaults__"):
                self._value(f"{where}{part}", part, getattr(value, part, None))
            for cell in getattr(value, "__closure__", None) or ():
                self._value(f"{where} closure", "cell", cell.cell_contents)
        elif dataclasses.is_dataclass(value):
            field(tag, f"dataclass {_class_id(type(value))}")
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
            _refuse_attention(where, config)
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
            h.field("class", _class_id(type(tensor)))
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


def _refuse_patched(where: str, module: torch.nn.Module) -> None:
    """Refuse behaviour that was changed from outside and that no digest can describe."""
    attributes = vars(module)
    if "_orig_mod" in module._modules or attributes.get("_compiled_call_impl") is not None:
        raise IdentityError(f"{where} is compiled", "pass the model as it was before torch.compile (._orig_mod)")
    _refuse_hooks(where, module._forward_hooks.values())
    _refuse_hooks(where, module._forward_pre_hooks.values())
    if "forward" in attributes:
        hook, old = attributes.get("_hf_hook"), attributes.get("_old_forward")
        moved = type(hook).__module__.split(".")[0] == "accelerate"  # AlignDevicesHook: moves tensors, no more
        if not (moved and getattr(old, "__func__", None) is type(module).forward):
            raise IdentityError(
                f"{where}.forward is patched", "delete the attribute, or write a subclass: its source is identified"
            )


def _refuse_hooks(where: str, hooks: Iterable[Callable[..., Any]]) -> None:
    for hook in hooks:
        origin, name = getattr(hook, "__module__", ""), getattr(hook, "__qualname__", type(hook).__qualname__)
        # Left behind by output_hidden_states=True: it only takes notes. The others let gradients reach the input.
        notes = origin == "transformers.utils.output_capturing"
        grads = name.endswith(("make_inputs_require_grads", "make_inputs_require_grad")) and origin.split(".")[0] in (
            "transformers",
            "peft",
        )
        if not (notes or grads or getattr(hook, IDENTIFIED, False)):
            raise IdentityError(
                f"{where} has a forward hook, {origin}.{name}, that could change the results",
                "remove the handle, or use promptdb.hooks, which names what it changes",
            )


def _refuse_attention(where: str, config: Any) -> None:
    """Refuse an attention function of the user's own: implementations are not part of the ID, as libraries' agree."""
    name = getattr(config, "_attn_implementation", None)
    if not isinstance(name, str) or name == "eager":
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(name)
    origin = getattr(function, "__module__", None) or "transformers"
    if origin.split(".")[0] not in _LIBRARIES and "/" not in name and not getattr(function, IDENTIFIED, False):
        raise IdentityError(
            f"{where}: attention implementation {name!r} is {origin}.{getattr(function, '__qualname__', function)}",
            "use one that ships with transformers, such as 'sdpa'",
        )


def _code_id(where: str, function: Any) -> str:
    """Name a function of a known library; add the source of any other, which may change under its name."""
    origin = getattr(function, "__module__", None) or "builtins"
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or type(function).__qualname__
    if origin.split(".")[0] in _LIBRARIES:
        return f"{origin}.{name}"
    return f"{name} {_source_id(where, function, origin)}"


def _class_id(cls: Any) -> str:
    """Name a class; add the sources of those of its bases that are not of a known library."""
    parts = [cls.__qualname__]
    for base in cls.__mro__:
        top = base.__module__.split(".")[0]
        if top in _LIBRARIES or top in sys.stdlib_module_names:  # __main__ is in neither
            parts.append(f"{base.__module__}.{base.__qualname__}")
            break  # the bases of a library's class are the library's
        parts.append(_source_id(base.__qualname__, base, base.__module__))
    return " ".join(parts)


def _source_id(where: str, code: Any, origin: str) -> str:
    """Digest of the file that defines ``code``, as its helpers count too; in a notebook, of its own source.

    Its bytecode as well, as the file may have been edited since it was loaded: such an ID then differs between Python
    versions. Not the module's name: transformers puts a checkpoint's path into the names of modules that come with it.
    """
    import inspect

    try:
        path = Path(inspect.getsourcefile(code) or "")
        text = path.read_bytes() if path.is_file() else inspect.getsource(code).encode()
    except (OSError, TypeError) as error:
        raise IdentityError(f"{where}: no source for {origin}.{code!r}", "define it in a file") from error
    h = FieldHasher("promptdb/source/1").field("text", text)
    members = {"": code} if not isinstance(code, type) else dict(vars(code))
    if origin != "__main__":
        members |= vars(sys.modules.get(origin, types.SimpleNamespace()))
    for name in sorted(members):
        member = getattr(members[name], "__func__", members[name])
        if isinstance(member, types.FunctionType) and (member is code or member.__module__ == origin):
            h.field("name", name)
            _bytecode(h, member.__code__)
            inner = getattr(member, "__wrapped__", None)  # under a decorator
            if isinstance(inner, types.FunctionType):
                _bytecode(h, inner.__code__)
    return h.digest().hex()


def _bytecode(h: FieldHasher, code: types.CodeType) -> None:
    h.field("code", code.co_code).field("names", " ".join(code.co_names))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _bytecode(h, constant)
        elif isinstance(constant, (int, float, complex, str, bytes, tuple, type(None))):
            h.field("constant", repr(constant))  # not of sets, whose order differs by process


_PROBES = (
    "Hello there. General Kenobi!",
    " leading and trailing ",
    "\n",
    "\n\n",
    "\t tabs,  two  spaces\r\n",
    "0123456789 3.14159 1,000,000",
    "naïve café ﬁn Ångström e\u0301",
    "日本語のテキスト 한국어 Ελληνικά العربية",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "<s></s><unk><pad><|endoftext|><|im_start|>user<bos><eos>[CLS][SEP][INST]",
    "def f(x):\n    return x**2  # code\n",
    "UPPER lower iNvErTeD \u00a0\u200b\u3000",
)


def tokenizer_id(tokenizer: Any) -> str:
    """Identify a tokenizer by its effective backend and by what it does to probe strings.

    Unchanged by earlier calls with truncation or padding, by ``pad_token``, and by saving and loading.

    Parameters
    ----------
    tokenizer : a fast or slow transformers tokenizer, or a ``tokenizers.Tokenizer``.

    Returns
    -------
    str
        64 hexadecimal digits. A transformers tokenizer and its bare backend have different IDs.

    Raises
    ------
    IdentityError
        It is neither, or its merges are random (BPE dropout).

    Notes
    -----
    Cost: serialises the vocabulary, some 0.1 s for 50,000 entries. Not thread safe for tokenizers in use elsewhere.
    """
    import tokenizers

    h = FieldHasher("promptdb/tokenizer/1")
    bare = isinstance(tokenizer, tokenizers.Tokenizer)
    backend: Any = tokenizer if bare else getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        spec = json.loads(backend.to_str())
        limited = spec.pop("truncation", None) is not None or spec.pop("padding", None) is not None
        spec.pop("truncation", None), spec.pop("padding", None)
        if spec.get("model", {}).get("dropout"):
            raise IdentityError("the tokenizer drops merges at random", "set its model's dropout to None")
        h.field("kind", "bare" if bare else "fast")
        h.field("backend", json.dumps(spec, sort_keys=True, ensure_ascii=False, separators=(",", ":")))
        if bare:
            h.field("encode_special_tokens", bool(backend.encode_special_tokens))
            if limited:  # calls set these; the probes must not see them
                copy = tokenizers.Tokenizer.from_str(json.dumps(spec))
                copy.encode_special_tokens = backend.encode_special_tokens
                backend = copy
    elif callable(getattr(tokenizer, "get_vocab", None)):
        h.field("kind", "slow").field("class", _class_id(type(tokenizer)))
        for token, index in sorted(tokenizer.get_vocab().items()):
            h.field("token", str(token)).field("index", int(index))
        model = getattr(getattr(tokenizer, "sp_model", None), "serialized_model_proto", None)
        h.field("sentencepiece", model() if callable(model) else None)
    else:
        raise IdentityError(f"a {type(tokenizer).__name__} is no tokenizer", "pass one of transformers or tokenizers")
    if not bare:
        for name in ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "split_special_tokens"):
            value = getattr(tokenizer, name, None)
            h.field(name, value if value is None or isinstance(value, bool) else str(value))
    for probe in _PROBES:
        try:
            ids = backend.encode(probe).ids if bare else tokenizer(probe)["input_ids"]
        except Exception as error:  # noqa: BLE001 - backends raise bare Exception for text that they cannot encode
            h.field("probe", probe).field("error", type(error).__name__)
        else:
            h.field("probe", probe).field("ids", struct.pack(f"<{len(ids)}Q", *ids))
    return h.digest().hex()
