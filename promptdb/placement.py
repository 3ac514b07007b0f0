"""Where a model's weights are while no module of it runs: in place, or kept aside by accelerate's hooks.

A module whose weights are offloaded has parameters without content (device meta). Its hook holds a map of the real
ones, and puts those in their place, on the device where the module runs, for as long as it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from promptdb.errors import IdentityError

if TYPE_CHECKING:
    import torch

__all__ = ["device_of", "kept_aside", "moves_only", "weight_of"]

_HINT = "promptdb.offloading.offload(model, device, folder=...) keeps weights where they can be identified"


def moves_only(hook: Any) -> bool:
    """Whether a hook of accelerate's does nothing but move tensors."""
    kind = type(hook)
    if kind.__module__ != "accelerate.hooks":
        return False
    if kind.__name__ == "SequentialHook":
        return all(map(moves_only, hook.hooks))
    return kind.__name__ in ("AlignDevicesHook", "CpuOffload")


def _offloading(module: torch.nn.Module) -> Any:
    """Return the hook that keeps a module's own weights aside, or None."""
    hook = vars(module).get("_hf_hook")
    if hook is None or not moves_only(hook):
        return None
    hooks = hook.hooks if type(hook).__name__ == "SequentialHook" else [hook]
    found = [each for each in hooks if getattr(each, "offload", False) and hasattr(each, "weights_map")]
    return found[0] if len(found) == 1 else None


def _plain_map(weights: Any) -> Any:
    """Return the dict below the maps that accelerate makes; what is no dict cannot be watched."""
    while type(weights).__module__ == "accelerate.utils.offload":
        weights = weights.dataset if type(weights).__name__ == "PrefixedDataset" else weights.state_dict
    return weights


def kept_aside(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the dicts that say what a module's offloaded weights are, to be watched for changes."""
    hook = _offloading(module)
    if hook is None:
        return []
    weights = _plain_map(hook.weights_map)
    return [vars(hook), weights] if type(weights) is dict else [vars(hook)]


def weight_of(where: str, module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a module's parameter or buffer itself, or what its hook puts in its place when the module runs.

    Raises
    ------
    IdentityError
        The hook reads it anew each time, from files that may change unseen, or gives something else.
    """
    hook = _offloading(module) if tensor.is_meta else None
    if hook is None:
        return tensor
    try:
        found, again = hook.weights_map[name], hook.weights_map[name]
    except (KeyError, OSError) as error:
        raise IdentityError(f"{where} is offloaded, and cannot be read: {error}", _HINT) from error
    if found is not again or type(_plain_map(hook.weights_map)) is not dict:
        raise IdentityError(f"{where} is read from a file each time, which may change meanwhile", _HINT)
    if (found.dtype, found.shape) != (tensor.dtype, tensor.shape) or found.is_meta or str(found.dtype) == "torch.int8":
        raise IdentityError(f"{where} is offloaded as {found.dtype} {tuple(found.shape)}, and runs as another", _HINT)
    kept: torch.Tensor = found
    return kept


def device_of(module: torch.nn.Module, parameter: torch.Tensor) -> torch.device:
    """Return where a module's parameter is when the module runs; meta if nobody knows."""
    hook = _offloading(module) if parameter.is_meta else None
    if hook is None or hook.execution_device is None:
        return parameter.device
    import torch

    device = torch.device(hook.execution_device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
