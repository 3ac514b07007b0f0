"""Tokens and texts as people can read them on one line."""

from __future__ import annotations

from collections.abc import Sequence

from promptdb.db import PromptDB
from promptdb.errors import IdentityError
from promptdb.keys import Root, unpack_tokens
from promptdb.tokens import Encoder


def printable(text: str) -> str:
    """Return a text on one line: what does not print, and what would steer the terminal, is escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def quoted(text: str) -> str:
    """Return a text on one line, in quotes, so that spaces at its ends show."""
    return f'"{printable(text)}"'


def head(text: str, width: int) -> str:
    """Return the start of a text, as :func:`quoted`; at most ``width`` characters in the quotes."""
    shown = printable(text[: width + 1])
    return f'"{shown}"' if len(shown) <= width else f'"{shown[:width]}"…'


def tail(text: str, width: int) -> str:
    """Return the end of a text, as :func:`quoted`; at most ``width`` characters in the quotes."""
    shown = printable(text[-width - 1 :])
    return f'"{shown}"' if len(shown) <= width else f'…"{shown[-width:]}"'


def token_texts(encoder: Encoder, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """Return the text of each token, as it reads after the tokens before it.

    Some tokenizers drop the space at the start of what they decode; decoding a token with its predecessor keeps it. A
    token that holds a part of a character reads as U+FFFD.
    """
    texts = []
    for number, token in enumerate(ids):
        previous = [*before[-1:]] if number == 0 else [ids[number - 1]]
        alone = encoder.decode(previous) if previous else ""
        joined = encoder.decode([*previous, token])
        longer = joined.startswith(alone) and len(joined) > len(alone)
        texts.append(joined[len(alone) :] if longer else encoder.decode([token]))
    return texts


class Decoders:
    """Turns stored tokens into text with the tokenizers that the store knows, each loaded once."""

    def __init__(self, db: PromptDB) -> None:
        self._db = db
        self._encoders: dict[str, Encoder | None] = {}

    def encoder(self, root: Root) -> Encoder | None:
        """Return the tokenizer of a root, or None if it does not run without transformers."""
        if root.tokenizer_id not in self._encoders:
            try:
                known = Encoder.from_registry(self._db.registry.tokenizer(root.tokenizer_id))
            except (IdentityError, ValueError):
                known = None
            self._encoders[root.tokenizer_id] = known
        return self._encoders[root.tokenizer_id]

    def text(self, root: Root, packed: bytes) -> str:
        """Return the text of packed tokens, or their IDs if the tokenizer is not at hand."""
        ids = unpack_tokens(packed)
        encoder = self.encoder(root)
        return " ".join(map(str, ids)) if encoder is None else encoder.decode(ids)
