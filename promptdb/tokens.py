"""Text to token IDs, and where the pieces of a prompt end among them. Needs the tokenizers library only.

A prompt is tokenised whole and matched on IDs: merges across the ends of pieces ("\\n" + "\\n" is not "\\n\\n") and
special tokens at the start are then what the model would see. The ends of pieces only say where spans are cut; an end
that falls inside a token is moved back to the token's start.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from promptdb.errors import EmptyPromptError, IdentityError, InputTypeError, TextEncodingError
from promptdb.keys import num_tokens, pack_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PROBES = ("Hello there.", " General\n\nKenobi  ", "naïve 你好 🙂\t42")

_FALSE, _TRUE = pack_tokens([0]), pack_tokens([1])


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt: packed tokens, and the positions (in tokens, rising) where pieces end inside of it.

    ``piece_ends`` says for each piece but the last how many tokens end before it does, 0 and all of them included; None
    if the tokenizer does not tell.
    """

    packed: bytes
    boundaries: tuple[int, ...] = ()
    text: str | None = None
    piece_ends: tuple[int, ...] | None = ()

    @property
    def num_tokens(self) -> int:
        """Length in tokens."""
        return num_tokens(self.packed)


class Encoder:
    """Turns text into token IDs exactly as ``tokenizer(text)`` does. Thread safe.

    Parameters
    ----------
    tokenizer : a transformers tokenizer, fast or slow, or a ``tokenizers.Tokenizer``. Fast ones are copied, so that
        padding, truncation or tokens that a caller sets later do not reach the encoder.

    Raises
    ------
    InputTypeError
        Something else.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend: Tokenizer | None = None
        self._call: Callable[..., Any] | None = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None and hasattr(tokenizer, "encode_batch") and hasattr(tokenizer, "to_str"):
            backend = tokenizer
        if backend is not None:
            from tokenizers import Tokenizer

            copy = Tokenizer.from_str(backend.to_str())
            copy.no_padding()
            copy.no_truncation()
            copy.encode_special_tokens = bool(
                getattr(tokenizer, "split_special_tokens", getattr(backend, "encode_special_tokens", False))
            )
            self._backend = copy
        if callable(tokenizer):
            kind = type(tokenizer)
            encoders = (kind.__call__, getattr(kind, "_encode_plus", kind.__call__))
            is_own = any(not encoder.__module__.startswith("transformers.") for encoder in encoders)
            if (
                self._backend is None
                or is_own
                or any(self._backend.encode(probe).ids != tokenizer(probe)["input_ids"] for probe in _PROBES)
            ):
                self._backend, self._call = None, tokenizer
        elif self._backend is None:
            raise InputTypeError(
                f"{type(tokenizer).__name__} is not a tokenizer",
                "pass a transformers tokenizer or a tokenizers.Tokenizer",
            )

    @classmethod
    def from_registry(cls, fields: dict[str, Any] | None) -> Encoder:
        """Return the encoder that was registered in a store, without transformers.

        Raises
        ------
        IdentityError
            The tokenizer is unknown, or is a slow one that only transformers can run.
        """
        if not fields or not fields.get("json"):
            raise IdentityError(
                "the store does not hold this tokenizer in a form that runs without transformers", "use --compute"
            )
        from tokenizers import Tokenizer

        encoder = cls.__new__(cls)
        encoder._call = None
        encoder._backend = Tokenizer.from_str(fields["json"])
        encoder._backend.encode_special_tokens = bool(fields["encode_special_tokens"])
        return encoder

    def registry_fields(self) -> dict[str, Any]:
        """Return what :meth:`from_registry` needs."""
        if self._backend is None:
            return {"json": "", "encode_special_tokens": False}
        return {"json": self._backend.to_str(), "encode_special_tokens": self._backend.encode_special_tokens}

    def encode(self, prompt: str | Sequence[str]) -> Prompt:
        """Tokenise a text, or the concatenation of pieces.

        Returns
        -------
        Prompt
            With one boundary per inner end of a piece that has tokens before and after it.

        Raises
        ------
        InputTypeError
            Not text.
        TextEncodingError
            The text has surrogates: it did not come from valid UTF-8.
        EmptyPromptError
            The text is empty, or has no tokens.
        """
        pieces = [prompt] if isinstance(prompt, str) else list(prompt)
        for piece in pieces:
            if not isinstance(piece, str):
                raise InputTypeError(f"a piece of a prompt must be a str, not {type(piece).__name__}")
        text = "".join(pieces)
        if not text:
            raise EmptyPromptError("the prompt is empty", "give at least one character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextEncodingError(
                f"the text is not valid Unicode at character {error.start}", "read it as UTF-8"
            ) from error
        ids, ends = self._encode(text)
        if not ids:
            raise EmptyPromptError("the prompt has no tokens", "the tokenizer drops all of its characters")
        if ends is None:
            return Prompt(pack_tokens(ids), (), text, None if len(pieces) > 1 else ())
        inner = tuple(bisect_right(ends, length) for length in accumulate(map(len, pieces[:-1])))
        boundaries = tuple(sorted({position for position in inner if 0 < position < len(ids)}))
        return Prompt(pack_tokens(ids), boundaries, text, inner)

    def _encode(self, text: str) -> tuple[list[int], list[int] | None]:
        """Return IDs, and for each token where the text of it and all before it ends, in characters."""
        if self._backend is not None:
            encoding = self._backend.encode(text)
            return encoding.ids, list(accumulate((end for _, end in encoding.offsets), max))
        assert self._call is not None
        if getattr(self._call, "is_fast", False):
            output = self._call(text, return_offsets_mapping=True)
            return list(output["input_ids"]), list(accumulate((end for _, end in output["offset_mapping"]), max))
        return list(self._call(text)["input_ids"]), None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token IDs, special tokens included."""
        if self._backend is not None:
            return self._backend.decode(list(ids), skip_special_tokens=False)
        return str(self._call.decode(list(ids)))  # type: ignore[union-attr]


def as_prompt(prompt: Any, encoder: Encoder) -> Prompt:
    """Tokenise whatever a caller may give for a prompt.

    Parameters
    ----------
    prompt : text; a list of pieces of text; an object with ``pieces()`` (a ``Text``); or n token IDs as a sequence of
        int,
        an array or a tensor of shape ``[n]`` or ``[1, n]``.

    Raises
    ------
    InputTypeError, EmptyPromptError, TokenRangeError, TextEncodingError
        Something else, nothing, or something that is not valid.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return encoder.encode(prompt)
    if hasattr(prompt, "pieces"):
        return encoder.encode(prompt.pieces())
    if isinstance(prompt, Mapping):
        raise InputTypeError("a prompt must not be a tokenizer's output", 'pass its ["input_ids"]')
    if hasattr(prompt, "tolist") and not isinstance(prompt, array):  # numpy and torch
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1:
            raise InputTypeError(f"token IDs of shape {list(prompt.shape)}", "pass one prompt: [n] or [1, n]")
        prompt = prompt.tolist()
    if not isinstance(prompt, (Sequence, array)) or isinstance(prompt, (bytes, bytearray, memoryview)):
        raise InputTypeError(
            f"a prompt must be text, pieces of text or token IDs, not {type(prompt).__name__}",
            "bytes have to be decoded first" if isinstance(prompt, bytes) else "",
        )
    if not len(prompt):
        raise EmptyPromptError("the prompt is empty", "give at least one token")
    if all(isinstance(piece, str) for piece in prompt):
        return encoder.encode(prompt)
    packed = pack_tokens(prompt)
    # Looking at every type takes longer than packing: only where there is a 0 or 1, or what looks like it.
    if (_FALSE in packed or _TRUE in packed) and bool in set(map(type, prompt)):
        raise InputTypeError("token IDs must be integers, not booleans", "is this an attention mask?")
    return Prompt(packed)
