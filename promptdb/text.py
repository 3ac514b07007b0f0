"""Text: prompts made with ``+``, whose pieces keep their representations."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from promptdb.errors import InputTypeError

if TYPE_CHECKING:
    from promptdb.engine import Engine
    from promptdb.keys import Root
    from promptdb.representation import Representation

_SHOWN_CHARACTERS = 30


class Text:
    """A piece of a prompt, or several joined with ``+``.

    Parameters
    ----------
    string : the text.
    engine : an :class:`~promptdb.Engine`, or a tuple ``(model, tokenizer)``: the texts of one model then share a store
        in memory, which lives as long as one of them does.
    eager : compute at once, and so does every sum that this text is a part of.
    logits : ``"last"`` or ``"all"``, as in :meth:`Engine.get`.

    Notes
    -----
    Immutable but for its result. A sum holds its two sides, so that thousands of pieces cost thousands of small
    objects; they are joined without recursion when they are needed. The whole text is tokenised at once and spans are
    cut where pieces end, so that every intermediate sum is stored as well.

    Examples
    --------
    >>> context = Text("Hello there.", (model, tokenizer))  # doctest: +SKIP
    >>> prompt = context + " General" + " Kenobi"  # doctest: +SKIP
    >>> prompt()  # doctest: +SKIP
    >>> prompt.model_repr[1].logits[:, -1, :]  # doctest: +SKIP
    """

    def __init__(
        self, string: str, engine: Engine | tuple[Any, Any], *, eager: bool = False, logits: str = "last"
    ) -> None:
        if not isinstance(string, str):
            raise InputTypeError(f"string must be a str, not {type(string).__name__}")
        self._string: str | None = string
        self._sides: tuple[Text, Text] | None = None
        self._engine = _engine_for(engine)
        self._logits = logits
        self._eager = eager
        self._result: tuple[Root, Representation] | None = None  # and what it was computed with
        if eager:
            self()

    @classmethod
    def _sum(cls, left: Text, right: Text) -> Text:
        if left._engine is not right._engine:
            raise InputTypeError("texts of different models cannot be joined", "give both the same engine")
        text = cls.__new__(cls)
        text._string = None
        text._sides = (left, right)
        text._engine = left._engine
        text._logits = "all" if "all" in (left._logits, right._logits) else "last"
        text._eager = left._eager or right._eager
        text._result = None
        if text._eager:
            text()
        return text

    def __add__(self, other: Text | str) -> Text:
        return Text._sum(self, self._as_text(other)) if isinstance(other, (Text, str)) else NotImplemented

    def __radd__(self, other: str) -> Text:
        return Text._sum(self._as_text(other), self) if isinstance(other, str) else NotImplemented

    def _as_text(self, other: Text | str) -> Text:
        if isinstance(other, Text):
            return other
        text = Text.__new__(Text)
        text._string, text._sides, text._engine = other, None, self._engine
        text._logits, text._eager, text._result = "last", False, None
        return text

    def pieces(self) -> list[str]:
        """Return the strings that the text was made from, in order."""
        found: list[str] = []
        waiting = [self]
        while waiting:
            text = waiting.pop()
            if text._sides is None:
                found.append(text._string or "")
            else:
                waiting += reversed(text._sides)
        return found

    @property
    def string(self) -> str:
        """The whole text."""
        if self._string is None:
            self._string = "".join(self.pieces())
        return self._string

    @property
    def engine(self) -> Engine:
        """The engine that computes this text."""
        return self._engine

    def __call__(self, *, logits: str | None = None) -> Representation:
        """Compute what is missing, and return the representation; the second time nothing is computed, unless the model
        has changed.

        Parameters
        ----------
        logits : ``"last"`` or ``"all"``; by default as the text was made.
        """
        wanted = logits or self._logits
        known = self._known()
        if (
            known is None
            or (wanted == "all" and self._logits != "all")
            or known.logits.dim() != (2 if wanted == "all" else 1)
        ):
            self._logits = wanted
            root = self._engine.root  # before: if it changes meanwhile, all is computed again the next time
            known = self._engine.get(self, logits=wanted)
            self._result = root, known
        return known

    def _known(self) -> Representation | None:
        """Return the representation, if there is one of the model as it is now."""
        return self._result[1] if self._result is not None and self._result[0] == self._engine.root else None

    @property
    def representation(self) -> Representation:
        """The representation; computed if it was not yet."""
        return self()

    @property
    def model_repr(self) -> tuple[Any, Any]:
        """``(encoding, output)``, computed if they were not yet.

        The encoding is a ``BatchEncoding`` with ``input_ids`` and ``attention_mask`` ``[1, n]``. The output is a
        ``CausalLMOutputWithPast``: ``logits`` are ``[1, 1, vocabulary]``, or ``[1, n, vocabulary]`` if all were asked
        for; ``past_key_values`` is a fresh cache.
        """
        import torch
        from transformers import BatchEncoding
        from transformers.modeling_outputs import CausalLMOutputWithPast

        representation = self()
        input_ids = torch.tensor([representation.token_ids], device=self._engine.device)
        encoding = BatchEncoding({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
        logits = representation.logits
        rows = logits[None] if logits.dim() == 2 else logits[None, None]
        return encoding, CausalLMOutputWithPast(logits=rows, past_key_values=representation.past_key_values())

    def __repr__(self) -> str:
        string = self.string
        if len(string) > _SHOWN_CHARACTERS:
            half = (_SHOWN_CHARACTERS - 5) // 2
            string = f"{string[:half]} ... {string[-half:]}"
        return f"Text({string!r})"


def run(texts: Iterable[Text]) -> list[Text]:
    """Compute many texts as one tree, and return them: each distinct missing token is computed once.

    Parameters
    ----------
    texts : of one engine or of several. Those that want all logits are computed one by one, as those are not stored.

    Examples
    --------
    >>> texts = promptdb.run([context + choice for choice in choices])  # doctest: +SKIP
    """
    found = list(texts)
    by_engine: dict[int, list[Text]] = {}
    for text in found:
        if not isinstance(text, Text):
            raise InputTypeError(f"a text must be a Text, not {type(text).__name__}", "Text(string, engine)")
        if text._logits == "all":
            text()
        elif text._known() is None:
            by_engine.setdefault(id(text._engine), []).append(text)
    for group in by_engine.values():
        root = group[0]._engine.root
        for text, representation in zip(group, group[0]._engine.run(group), strict=True):
            text._result = root, representation
    return found


# Lives as long as one of its texts does. The engine keeps model and tokenizer alive, so that their id() stay theirs.
_engines: weakref.WeakValueDictionary[tuple[int, int], Engine] = weakref.WeakValueDictionary()
_engines_lock = threading.Lock()


def _engine_for(engine: Any) -> Engine:
    from promptdb.engine import Engine

    if isinstance(engine, Engine):
        return engine
    if not isinstance(engine, tuple) or len(engine) != 2:
        raise InputTypeError(
            f"a Text needs an Engine or a tuple (model, tokenizer), not {type(engine).__name__}",
            "Text(string, (model, tokenizer))",
        )
    model, tokenizer = engine
    from promptdb.db import PromptDB

    with _engines_lock:
        known = _engines.get((id(model), id(tokenizer)))
        if known is None:
            known = Engine(PromptDB.in_memory(), model, tokenizer)
            _engines[id(model), id(tokenizer)] = known
        return known
