"""Everything that promptdb raises on purpose.

::

    PromptDBError
    ├── StoreError (OSError)              the store cannot be opened, read or written
    │   ├── NotAStoreError                the path holds something else
    │   ├── FormatVersionError            written by a newer promptdb, or to be migrated
    │   ├── ReadOnlyStoreError            a write to a store that cannot be written
    │   ├── StoreFullError                no space left on the device
    │   ├── QuotaExceededError            a put that does not fit into the store's quota
    │   ├── RemoteFilesystemError         LMDB must not live on a network filesystem
    │   ├── StoreKeyError                 the key of an encrypted store is missing, wrong, or not called for
    │   ├── MissingLibraryError           an optional library is not installed
    │   ├── SharedError                   the shared store cannot be used; raised only where it is required
    │   └── WriteBehindError              a background write failed; raised by the next call and by close
    ├── CorruptDataError (ValueError)     a checksum, record or blob that does not hold
    ├── NodeNotFoundError (KeyError)      no stored span has this node ID
    ├── NotRecordedError (KeyError)       activations that are asked for were not recorded
    ├── PromptError (ValueError)          the prompt cannot be used
    │   ├── EmptyPromptError              no tokens
    │   ├── PromptTooLongError            longer than the model's positions
    │   ├── TokenRangeError               a token ID outside the vocabulary
    │   └── TextEncodingError             the text is not valid Unicode
    ├── IdentityError (ValueError)        a model or tokenizer that cannot be identified by content
    ├── ModelError (ValueError)           the model cannot be used
    │   ├── ModelNotFoundError            no such checkpoint, or no tokenizer beside it
    │   ├── UnsupportedModelError         an architecture or cache layer that is not known to be exact
    │   ├── TrainModeError                the model is in train mode
    │   └── ModelPlacementError           the model is spread over several devices
    ├── ClusterError (RuntimeError)       machines that should compute together cannot be had, or went away
    ├── NonFiniteError (ArithmeticError)  NaN or infinity where a representation should be
    └── InputTypeError (TypeError)        an argument of the wrong type

Each doubles as the builtin that a caller would expect, and carries ``hint``: what to do about it.
"""

from __future__ import annotations

__all__ = [
    "ClusterError",
    "CorruptDataError",
    "EmptyPromptError",
    "FormatVersionError",
    "IdentityError",
    "InputTypeError",
    "MissingLibraryError",
    "ModelError",
    "ModelNotFoundError",
    "ModelPlacementError",
    "NodeNotFoundError",
    "NonFiniteError",
    "NotAStoreError",
    "NotRecordedError",
    "PromptDBError",
    "PromptError",
    "PromptTooLongError",
    "QuotaExceededError",
    "ReadOnlyStoreError",
    "RemoteFilesystemError",
    "SharedError",
    "StoreError",
    "StoreFullError",
    "StoreKeyError",
    "TextEncodingError",
    "TokenRangeError",
    "TrainModeError",
    "UnsupportedModelError",
    "WriteBehindError",
]


class PromptDBError(Exception):
    """Base of all errors that promptdb raises on purpose.

    Parameters
    ----------
    message : what is wrong, with the values that made it so.
    hint : what the reader can do about it; empty if there is nothing to do.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class StoreError(PromptDBError, OSError):
    """The store cannot be opened, read or written."""


class NotAStoreError(StoreError):
    """The path exists and holds something that is not a promptdb store."""


class FormatVersionError(StoreError):
    """The store was written in a format that this version cannot read."""


class ReadOnlyStoreError(StoreError):
    """A write to a store that was opened for reading, or whose files cannot be written."""


class StoreFullError(StoreError):
    """The device has no space left for the write; what is stored, less what was evicted for it, stays readable."""


class QuotaExceededError(StoreError):
    """What a put stores, with what may not be evicted, is larger than the store's quota; nothing of it is stored."""


class RemoteFilesystemError(StoreError):
    """The path is on a network filesystem, where LMDB's locks and memory map do not hold."""


class StoreKeyError(StoreError):
    """The key of an encrypted store is missing or wrong, or one was given for a store that is not encrypted."""


class MissingLibraryError(StoreError):
    """What is asked for, or how the store is written, needs an optional library that is not installed."""


class SharedError(StoreError):
    """The shared store cannot be reached, is not set up as it must be, or refuses what was asked of it."""


class WriteBehindError(StoreError):
    """A background write failed; the spans it held are not stored."""


class CorruptDataError(PromptDBError, ValueError):
    """A checksum, record or blob does not hold. ``node`` is the ID of the span it belongs to, where that is known."""

    node: bytes = b""


class NodeNotFoundError(PromptDBError, KeyError):
    """No stored span has this node ID."""


class NotRecordedError(PromptDBError, KeyError):
    """Activations of these positions were not recorded, or are not stored any more."""


class PromptError(PromptDBError, ValueError):
    """The prompt cannot be used."""


class EmptyPromptError(PromptError):
    """The prompt has no tokens."""


class PromptTooLongError(PromptError):
    """The prompt is longer than the positions that the model computes exactly."""


class TokenRangeError(PromptError):
    """A token ID is outside the model's vocabulary."""


class TextEncodingError(PromptError):
    """The text is not valid Unicode."""


class IdentityError(PromptDBError, ValueError):
    """A model or tokenizer cannot be identified by its content, so nothing may be stored for it."""


class ModelError(PromptDBError, ValueError):
    """The model cannot be used."""


class ModelNotFoundError(ModelError):
    """There is no such checkpoint, or no tokenizer beside it."""


class UnsupportedModelError(ModelError):
    """An architecture or cache layer that is not known to give exact results when extended."""


class TrainModeError(ModelError):
    """The model, or a part of it, is in train mode, where dropout makes results random."""


class ModelPlacementError(ModelError):
    """The model is spread over several devices, or its weights are not in memory."""


class ClusterError(PromptDBError, RuntimeError):
    """Machines that should compute together cannot be reached, do not agree on what they compute, or went away."""


class NonFiniteError(PromptDBError, ArithmeticError):
    """NaN or infinity in a representation; it is not stored."""


class InputTypeError(PromptDBError, TypeError):
    """An argument has the wrong type."""
