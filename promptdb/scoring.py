"""Log-probabilities of continuations, and classification by them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from promptdb import batch
from promptdb.errors import EmptyPromptError, InputTypeError
from promptdb.keys import num_tokens, unpack_tokens
from promptdb.tokens import Prompt, as_prompt

if TYPE_CHECKING:
    from promptdb.engine import Engine

NORMALIZATIONS = ("none", "tokens", "bytes")


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a continuation of m tokens is after its context.

    Attributes
    ----------
    token_ids : the continuation's m token IDs. A token that stands across the end of the context belongs to the
        continuation.
    token_logprobs : log-probability of each, given all before it, ``[m]`` float32, in nats.
    logprob : their sum.
    is_greedy : whether each is the most likely token at its place; None if the store does not know, as an older version
        wrote it.
    num_context_tokens : tokens before the continuation.
    tokens_loaded, tokens_computed : as in :class:`~promptdb.Representation`, for context and continuation.
    """

    token_ids: tuple[int, ...]
    token_logprobs: torch.Tensor
    logprob: float
    is_greedy: bool | None
    num_context_tokens: int
    tokens_loaded: int
    tokens_computed: int


@dataclass(frozen=True, eq=False)
class Classification:
    """Which of k choices fits a context.

    Attributes
    ----------
    choices : the k choices, in the order given.
    scores : the score of each.
    probabilities : ``[k]`` float64; sum to 1.
    best : the most probable choice.
    """

    choices: tuple[str, ...]
    scores: tuple[Score, ...]
    probabilities: torch.Tensor

    @property
    def best(self) -> str:
        """The most probable choice; the first of several."""
        return self.choices[int(self.probabilities.argmax())]


def score(
    engine: Engine,
    items: Iterable[Any],
    *,
    store: bool = True,
    limits: batch.BatchLimits | None = None,
    on_progress: Callable[[batch.Progress], None] | None = None,
) -> Iterator[Score]:
    """Yield the score of every (context, continuation); see :meth:`Engine.score`."""
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise InputTypeError(
            f"what is scored must be an iterable of pairs, not {type(items).__name__}", "put it in a list"
        )
    lengths: deque[int] = deque()  # of the contexts whose results are not there yet; a window at most

    def prompts() -> Iterator[Prompt]:
        for item in items:
            prompt, num_context = _pair(engine, item)
            lengths.append(num_context)
            yield prompt

    results = batch.run(engine, prompts(), want_logits=False, store=store, limits=limits, on_progress=on_progress)
    for result in results:
        num_context = lengths.popleft()
        token_ids = tuple(unpack_tokens(result.asked.packed))[num_context:]
        scores = result.scores[num_context:]
        known = bool((scores.greedy_ids >= 0).all())
        greedy = bool((scores.greedy_ids == torch.tensor(token_ids, dtype=torch.int32)).all()) if known else None
        yield Score(
            token_ids,
            scores.logprobs,
            float(scores.logprobs.double().sum()),
            greedy,
            num_context,
            result.tokens_loaded,
            result.tokens_computed,
        )


def _pair(engine: Engine, item: Any) -> tuple[Prompt, int]:
    """Return the tokens of a context and its continuation, and how many are the context's."""
    if isinstance(item, (str, bytes)) or not isinstance(item, Sequence) or len(item) != 2:
        raise InputTypeError(
            f"what is scored must be a pair (context, continuation), not {type(item).__name__}",
            'engine.score([("The sky is", " blue")])',
        )
    context, continuation = item
    if _is_text(context) != _is_text(continuation):
        raise InputTypeError(
            "context and continuation must both be text or both be token IDs", "tokenise one, or decode the other"
        )
    if not _is_text(continuation):
        sides = [_token_ids(side, engine) for side in (context, continuation)]
        num_context = num_tokens(sides[0])
        prompt = Prompt(b"".join(sides), (num_context,) if all(sides) else ())
    else:
        pieces = [context] if isinstance(context, str) else context.pieces() if hasattr(context, "pieces") else context
        after = continuation.pieces() if hasattr(continuation, "pieces") else continuation
        prompt = as_prompt([*pieces, after if isinstance(after, str) else "".join(after)], engine.encoder)
        if prompt.piece_ends is None:
            raise InputTypeError(
                "this tokenizer does not tell where tokens stand in the text", "pass token IDs, or use a fast tokenizer"
            )
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
    return prompt, num_context


def _token_ids(side: Any, engine: Engine) -> bytes:
    """Return the packed tokens of a context or a continuation, which may have none."""
    if isinstance(side, Sequence) and not isinstance(side, (str, bytes, bytearray, memoryview)) and not len(side):
        return b""
    return as_prompt(side, engine.encoder).packed


def _is_text(part: Any) -> bool:
    if isinstance(part, str) or hasattr(part, "pieces"):
        return True
    return isinstance(part, (list, tuple)) and bool(part) and all(isinstance(piece, str) for piece in part)


def classify(
    engine: Engine,
    contexts: Iterable[Any],
    choices: Sequence[str],
    *,
    prior: Mapping[str, float] | Sequence[float] | None = None,
    normalization: str = "none",
    store: bool = True,
) -> Iterator[Classification]:
    """Yield a classification for every context; see :meth:`Engine.classify`."""
    if isinstance(contexts, (str, bytes, Mapping)) or not isinstance(contexts, Iterable):
        raise InputTypeError(
            f"contexts must be an iterable of contexts, not {type(contexts).__name__}", "classify() takes one"
        )
    names = _checked(choices)
    weights = _log_prior(prior, names)
    if normalization not in NORMALIZATIONS:
        raise InputTypeError(f"normalization is {normalization!r}", f"choose one of {', '.join(NORMALIZATIONS)}")
    pairs = ((context, choice) for context in contexts for choice in names)
    scores = score(engine, pairs, store=store)
    while group := list(islice(scores, len(names))):
        sums = [found.logprob / _length(found, name, normalization) for found, name in zip(group, names, strict=True)]
        probabilities = torch.softmax(torch.tensor(sums, dtype=torch.float64) + weights, 0)
        yield Classification(names, tuple(group), probabilities)


def _checked(choices: Sequence[str]) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not all(isinstance(c, str) for c in choices):
        raise InputTypeError("choices must be a sequence of str", 'classify(context, [" yes", " no"])')
    if not choices or len(set(choices)) != len(choices):
        raise InputTypeError("choices must be one or more, all different", "the same continuation counts once")
    return tuple(choices)


def _log_prior(prior: Mapping[str, float] | Sequence[float] | None, names: Sequence[str]) -> torch.Tensor:
    if prior is None:
        return torch.zeros(len(names), dtype=torch.float64)
    if isinstance(prior, Mapping):
        if set(prior) != set(names):
            raise InputTypeError("the prior names other choices", "give a probability for each choice")
        prior = [prior[name] for name in names]
    weights = [float(weight) for weight in prior]
    if len(weights) != len(names) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputTypeError(f"prior is {weights}", f"give {len(names)} positive numbers, one for each choice")
    return torch.log(torch.tensor(weights, dtype=torch.float64))


def _length(found: Score, name: str, normalization: str) -> int:
    return {"none": 1, "tokens": len(found.token_ids), "bytes": len(name.encode())}[normalization]
