"""Models larger than a device: weights stay in main memory, or in files, and visit the device module by module.

The moving is accelerate's; see docs/hooks.md. The only user of accelerate.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from promptdb.errors import InputTypeError, MissingLibraryError, ModelPlacementError, StoreError

__all__ = ["offload"]


def _accelerate() -> Any:
    try:
        import accelerate.hooks
        import accelerate.utils
    except ImportError as error:
        raise MissingLibraryError(
            "weights are moved by accelerate, which is not installed", "pip install 'promptdb[offload]'"
        ) from error
    return accelerate


def offload(
    model: torch.nn.Module, device: str | torch.device, *, folder: str | os.PathLike[str] | None = None
) -> torch.nn.Module:
    """Let a model compute on a device that need not hold more than one module's weights at a time.

    Parameters
    ----------
    model : a model on the CPU; changed in place.
    device : where it computes.
    folder : where weights are kept, in files that are mapped into memory, so that main memory need not hold them
        either; a new or empty directory, which must stay as it is while the model is in use. By default they stay in
        main memory.

    Returns
    -------
    torch.nn.Module
        ``model``. Engines, hooks and recorders take it as any other, and find what the plain model has stored, and the
        reverse: its weights ID is the same.

    Raises
    ------
    ModelPlacementError
        It is offloaded or dispatched already, or its weights are not in main memory.
    StoreError
        The directory holds something, or cannot be written.
    MissingLibraryError
        accelerate is not installed.

    Notes
    -----
    Each pass copies all weights to the device: worth it for long prompts and batches. Buffers live on the device. Each
    call of an engine looks at the structure of the model again: milliseconds per hundred modules. An edit of a file
    in ``folder`` is noticed as an edit through ``.data`` is: see :class:`promptdb.watch.ModelWatch`. Taken off again by
    ``accelerate.hooks.remove_hook_from_module(model, recurse=True)``.
    """
    accelerate = _accelerate()
    if not isinstance(model, torch.nn.Module):
        raise InputTypeError(f"a {type(model).__name__} is not a torch.nn.Module", "pass the model itself")
    if any("_hf_hook" in vars(module) for module in model.modules()):
        raise ModelPlacementError(
            "the model has hooks of accelerate's already",
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)",
        )
    elsewhere = {parameter.device.type for parameter in model.parameters()} - {"cpu"}
    if elsewhere:
        raise ModelPlacementError(f"the model's weights are on {', '.join(sorted(elsewhere))}", "model.to('cpu') first")
    weights = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    if folder is not None:
        weights = _in_files(accelerate, weights, Path(folder))
    accelerate.cpu_offload(model, torch.device(device), state_dict=weights)
    return model


def _in_files(accelerate: Any, weights: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Write weights into files, and return them mapped from there; tied ones are written once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise StoreError(f"{folder} is not empty", "give a new directory")
        first: dict[tuple[int, torch.Size, torch.dtype], str] = {}
        names = {
            name: first.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), name)
            for name, tensor in weights.items()
        }
        accelerate.utils.offload_state_dict(str(folder), {name: weights[name] for name in first.values()})
        mapped = {name: _mapped(folder / f"{name}.dat", weights[name]) for name in first.values()}
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder} cannot be written: {error}", "check the disk and its permissions") from error
    return {name: mapped[names[name]] for name in weights}


def _mapped(path: Path, like: torch.Tensor) -> torch.Tensor:
    if not like.numel():
        return like
    return torch.from_file(str(path), shared=False, size=like.numel(), dtype=like.dtype).view(like.shape)
