"""Which stored model a checkpoint is, told from its files alone: no weights, no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptdb.checkpoint import describe, resolve, tokenizer_files_present
from promptdb.db import PromptDB
from promptdb.errors import CorruptDataError, ModelNotFoundError, PromptTooLongError
from promptdb.keys import Root
from promptdb.loading import checkpoint_key
from promptdb.tokens import Encoder, Prompt

from .failure import Failure
from .options import DTYPES

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


class UnknownModelError(Failure):
    """The store does not know the checkpoint: nothing can be found for it. Exit code 1."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint, exit_code=1)


@dataclass(frozen=True)
class KnownModel:
    """A model that the store knows, and its tokenizer."""

    root: Root
    encoder: Encoder
    model_type: str
    max_tokens: int

    def tokenize(self, pieces: tuple[str, ...]) -> Prompt:
        """Return the prompt's tokens; raises :class:`PromptError` for what cannot be stored."""
        return check_length(self.encoder.encode(pieces), self.model_type, self.max_tokens)


def most_positions(config: Mapping[str, Any]) -> int:
    """Return how long a prompt may be, as a checkpoint's configuration says; 0 if it does not."""
    return min((config[name] for name in _POSITIONS if type(config.get(name)) is int), default=0)


def check_length(prompt: Prompt, model_type: str, max_tokens: int) -> Prompt:
    """Return a prompt unless it is longer than the model's positions; 0 is no limit. Raises as the engine does."""
    if 0 < max_tokens < prompt.num_tokens:
        limit = f"this {model_type} computes {max_tokens} positions exactly"
        raise PromptTooLongError(f"the prompt has {prompt.num_tokens} tokens; {limit}", "shorten the prompt")
    return prompt


def find_model(db: PromptDB, model: str, dtype: str, namespace: str, kv_codec: str | None = None) -> KnownModel:
    """Return the stored model that a checkpoint is, from a digest of its files' names, sizes and times.

    Raises
    ------
    ModelNotFoundError
        There is no such checkpoint, or no tokenizer beside it.
    UnknownModelError
        The store does not know it, or its files have changed; the message tells which.
    IdentityError
        Its tokenizer runs with transformers only.
    """
    root = find_root(db, model, dtype, namespace, kv_codec)
    try:
        encoder = Encoder.from_registry(db.registry.tokenizer(root.tokenizer_id))
        fields = db.registry.model(root.weights_id) or {}
        return KnownModel(root, encoder, str(fields.get("model_type", "model")), int(fields.get("max_tokens") or 0))
    except (KeyError, TypeError) as error:
        raise _garbled(model, error) from error


def find_root(db: PromptDB, model: str, dtype: str, namespace: str, kv_codec: str | None = None) -> Root:
    """Return the identity that a checkpoint's prompts are stored under. Otherwise as :func:`find_model`."""
    directory = resolve(model)
    known = db.registry.checkpoint(checkpoint_key(directory, dtype))
    if known is None:
        check_files(directory)
        raise _unknown(db, model, directory, dtype)
    try:
        return Root(known["weights_id"], known["tokenizer_id"], namespace, kv_codec=kv_codec or "")
    except (KeyError, TypeError) as error:
        raise _garbled(model, error) from error


def _garbled(model: str, error: Exception) -> CorruptDataError:
    message = f"the store's entry of {model} lacks or garbles {error}"
    return CorruptDataError(message, "`promptdb put` writes it again")


def check_checkpoint(model: str) -> None:
    """Raise what is wrong with a checkpoint on this machine, before a store is created or torch is imported.

    A name that may be on the hub passes.
    """
    if Path(model).expanduser().exists() or model.startswith((".", "/", "~")):
        check_files(resolve(model))


def check_files(directory: Path) -> None:
    """Raise :class:`ModelNotFoundError` unless a directory holds a model's configuration and a tokenizer."""
    describe(directory)
    if not tokenizer_files_present(directory):
        raise ModelNotFoundError(
            f"there is no tokenizer in {directory}", "save it there: tokenizer.save_pretrained(directory)"
        )


def _unknown(db: PromptDB, model: str, directory: Path, dtype: str) -> UnknownModelError:
    for other in DTYPES:
        if other != dtype and db.registry.checkpoint(checkpoint_key(directory, other)):
            return UnknownModelError(
                f"the store does not know {model} as {dtype}, but as {other}",
                f"add --dtype {other}; other weights, or the same in another precision, have other representations",
            )
    paths = {Path(path).resolve() for entry in db.registry.checkpoints() if (path := entry.get("path"))}
    if directory.resolve() in paths:
        return UnknownModelError(
            f"the files of {model}, or the versions of torch and transformers, have changed since it was stored",
            "`promptdb put` or `promptdb get --compute` identifies it again; what has not changed is found again",
        )
    return UnknownModelError(
        f"the store does not know {model}: nothing was stored with it",
        "`promptdb put` stores prompts; `promptdb models` lists what the store knows",
    )


def find_weights(db: PromptDB, model: str) -> set[str]:
    """Return the weights IDs that a person may mean: by directory, name, or start of the ID.

    A directory stands for its files as they are now, or for what they were when the store does not know those.

    Raises
    ------
    UnknownModelError
        None.
    """
    models = db.registry.models()
    found = {weights for weights in models if len(model) >= 4 and weights.startswith(model.lower())}
    found |= {weights for weights, fields in models.items() if fields.get("name") == model}
    if Path(model).expanduser().is_dir():
        directory = Path(model).expanduser().resolve()
        now = [db.registry.checkpoint(checkpoint_key(directory, dtype)) for dtype in DTYPES]
        before = [entry for entry in db.registry.checkpoints() if Path(entry["path"]).resolve() == directory]
        found |= {entry["weights_id"] for entry in list(filter(None, now)) or before}
    if not found:
        raise UnknownModelError(f"the store knows no model {model!r}", "`promptdb models` lists them")
    return found
