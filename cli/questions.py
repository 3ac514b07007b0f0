"""What is scored: a context and one or more continuations of it, as a line of a file says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from promptdb.errors import EmptyPromptError, InputTypeError, PromptError
from promptdb.tokens import Prompt

from .failure import Failure
from .prompts import Line, at_place, checked, json_type

_EXAMPLE = 'write {"context": "...", "continuation": "..."} or {"context": "...", "choices": ["...", "..."]}'


@dataclass(frozen=True)
class Question:
    """A context in pieces, and what may come after it.

    Attributes
    ----------
    has_choices : the continuations are choices, of which one is the best.
    number : of its line.
    passed_through : what the result repeats of the line: its ``id``.
    """

    context: tuple[str, ...]
    continuations: tuple[str, ...]
    has_choices: bool = False
    place: str = ""
    number: int = 1
    passed_through: dict[str, Any] = field(default_factory=dict)

    def pairs(self, tokenize: Callable[[tuple[str, ...]], Prompt]) -> list[tuple[Prompt, int]]:
        """Return the tokens of each continuation after the context, and how many of them are the context's.

        Raises
        ------
        PromptError
            With the place: one is too long, has no tokens of its own, or the context has none.
        """
        try:
            return [_pair(tokenize((*self.context, each))) for each in self.continuations]
        except PromptError as error:
            raise at_place(error, self.place) from error


def _pair(prompt: Prompt) -> tuple[Prompt, int]:
    if prompt.piece_ends is None:
        raise InputTypeError("this tokenizer does not tell where tokens stand in the text", "use a fast tokenizer")
    num_context = prompt.piece_ends[-1]
    if num_context == 0:
        raise EmptyPromptError(
            "the context has no tokens, so that nothing says how likely the continuation's first token is",
            "put the tokenizer's BOS or EOS token before it",
        )
    if num_context >= prompt.num_tokens:
        raise EmptyPromptError(
            "the continuation has no tokens of its own", "give at least one character that is not dropped"
        )
    return Prompt(prompt.packed, (num_context,)), num_context


def as_question(found: Question | Line) -> Question:
    """Return what a line asks for; raises :class:`Failure` or :class:`PromptError` with its place."""
    if isinstance(found, Question):
        return found
    item = found.parse()

    def refuse(what: str) -> Failure:
        return Failure(f"{found.place}: {what}", _EXAMPLE)

    if not isinstance(item, dict):
        raise refuse(f"a line is a JSON object, not {json_type(item)}")
    kinds = [key for key in ("pieces", "continuation", "choices") if key in item]
    if len(kinds) != 1 or ("context" in item) == (kinds == ["pieces"]):
        keys = ", ".join(map(repr, item)) or "nothing"
        raise refuse(f"the object has {keys}; it needs 'context' and 'continuation' or 'choices', or only 'pieces'")

    def strings(key: str) -> tuple[str, ...]:
        value = item[key]
        values = [value] if isinstance(value, str) and key in ("context", "continuation") else value
        if not isinstance(values, list) or not values:
            raise refuse(f"{key!r} must be a list of strings, not {'empty' if values == [] else json_type(value)}")
        for each in values:
            if not isinstance(each, str):
                raise refuse(f"{key!r} must hold strings, not {json_type(each)}")
        return tuple(checked(each, found.place) for each in values)

    if kinds == ["pieces"]:
        *context, last = strings("pieces")
        if not context:
            raise refuse("'pieces' needs two: the last is scored, those before it are its context")
        before, after = tuple(context), [last]
    else:
        before, after = strings("context"), [*strings(kinds[0])]
    if len(set(after)) < len(after) or (kinds == ["continuation"] and len(after) > 1):
        raise refuse("the choices must be all different" if kinds == ["choices"] else "one 'continuation' is scored")
    passed_through = {"id": item["id"]} if "id" in item else {}
    return Question(before, tuple(after), kinds == ["choices"], found.place, found.number, passed_through)
