"""Loading checkpoints with transformers, remembering the IDs of their files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptdb.checkpoint import adapter_base, file_key, resolve, tokenizer_files_present
from promptdb.errors import InputTypeError, ModelError, ModelNotFoundError, ModelPlacementError

if TYPE_CHECKING:
    import torch

    from promptdb.db import PromptDB


def checkpoint_key(directory: Path, dtype: str = "auto") -> bytes:
    """Return the digest under which a store remembers the IDs of a checkpoint that is loaded as ``dtype``.

    Raises
    ------
    ModelNotFoundError
        It is an adapter, and the model that it adapts is not on this machine.
    """
    options = {"dtype": dtype, "transformers": version("transformers"), "torch": version("torch")}
    base = adapter_base(directory)
    if base is not None:  # an adapter's files say little without those of the model that it adapts
        options["adapter_base"] = file_key(base).hex()
    return file_key(directory, **options)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model and a tokenizer, and what the store remembers of their files."""

    model: Any
    tokenizer: Any
    directory: Path | None
    key: bytes | None
    known_weights_id: str | None

    def remember(self, db: PromptDB, weights_id: str, tokenizer_id: str) -> None:
        """Note the IDs of the files, so that the next process need not load them."""
        if self.key is not None and not db.readonly:
            fields = {"weights_id": weights_id, "tokenizer_id": tokenizer_id, "path": str(self.directory)}
            db.registry.add_checkpoint(self.key, fields)


def _device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputTypeError(f"{device!r} is no device", "cpu and cuda are") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ModelPlacementError(
            f"there is no {wanted}: torch finds {torch.cuda.device_count()} CUDA devices", "choose another device"
        )
    return wanted


def load_checkpoint(
    db: PromptDB,
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> LoadedCheckpoint:
    """Load a checkpoint in eval mode on one device; see :meth:`promptdb.Engine.from_pretrained`.

    Raises
    ------
    ModelNotFoundError
        There is no such checkpoint, or no tokenizer beside it.
    ModelError
        transformers cannot load it; its reason is part of the message.
    InputTypeError, ModelPlacementError
        There is no such dtype or device. Nothing has been read then.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not isinstance(path_or_hub_id, (str, os.PathLike)):
        raise InputTypeError(f"a checkpoint is named by a str or a path, not {type(path_or_hub_id).__name__}")
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise InputTypeError(f"{name!r} is not a dtype", 'choose "auto", "float32", "bfloat16" or "float16"')
    chosen = "auto" if name == "auto" else getattr(torch, name)
    target = _device(device)
    source, directory = os.fspath(path_or_hub_id), None
    try:
        directory = resolve(source)
    except ModelNotFoundError:
        if Path(source).exists() or not _may_be_on_hub(source):
            raise
    if directory is not None and not tokenizer_files_present(directory):
        raise ModelNotFoundError(
            f"there is no tokenizer in {directory}", "save it there: tokenizer.save_pretrained(directory)"
        )
    # Files that are replaced while they are loaded must not lend their identity to what was loaded.
    before = _key_or_none(directory, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory or source)
        model, report = AutoModelForCausalLM.from_pretrained(
            directory or source, dtype=chosen, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        kind = ModelNotFoundError if isinstance(error, OSError) else ModelError
        raise kind(
            f"transformers cannot load {source}: {str(error).splitlines()[0]}", "check the path or hub ID"
        ) from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report.get(problem):
            names = sorted(str(key) for key in report[problem])
            raise ModelError(
                f"{source} lacks {len(names)} weights, which transformers would draw at random: {', '.join(names[:3])}",
                "a base model without its language-model head cannot be used; choose the causal language model",
            )
    model = model.to(target).eval()
    if directory is None:  # it was downloaded just now
        try:
            directory = resolve(source)
        except ModelNotFoundError:
            return LoadedCheckpoint(model, tokenizer, None, None, None)
    key = _key_or_none(directory, name)
    if key is None or before not in (None, key):
        return LoadedCheckpoint(model, tokenizer, directory, None, None)
    known = db.registry.checkpoint(key) or {}
    # The ID is believed only if these very files were there before they were read.
    return LoadedCheckpoint(model, tokenizer, directory, key, known.get("weights_id") if before else None)


def _key_or_none(directory: Path | None, dtype: str) -> bytes | None:
    try:
        return None if directory is None else checkpoint_key(directory, dtype)
    except ModelNotFoundError:
        return None  # an adapter whose model is elsewhere: nothing is remembered


def _may_be_on_hub(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and os.environ.get("HF_HUB_OFFLINE") != "1"
