"""What a caller gets for a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from promptdb.errors import StoreError
from promptdb.keys import num_tokens, unpack_tokens

if TYPE_CHECKING:
    import torch

    from promptdb.cache import PromptCache


@dataclass(frozen=True, eq=False)
class Representation:
    """A model's representation of a prompt of n tokens.

    Attributes
    ----------
    packed : the n token IDs as :func:`promptdb.keys.pack_tokens` packs them.
    token_ids : the n token IDs.
    logits : next-token logits after the last token, ``[vocabulary]`` in the model's dtype; after every token,
        ``[n, vocabulary]``, if all were asked for.
    token_logprobs : log-probability of each token after the first given all before it, ``[n - 1]`` float32, in nats:
        ``token_logprobs[i]`` belongs to ``token_ids[i + 1]``.
    greedy_ids : the token that the model found most probable in the place of each of those, ``[n - 1]`` int32: a
        continuation is the greedy one if it equals its part of ``greedy_ids``. -1 where that is not known, because an
        older version stored the token.
    tokens_loaded, tokens_computed : how many tokens' keys and values came from the store, and how many went through the
        model; they add up to n. A full hit computes nothing.
    lookup_s, load_s, compute_s, store_s : seconds spent tokenising and looking up, reading, in the model, and preparing
        what is written.

    Notes
    -----
    Holds no keys and values: :meth:`past_key_values` fetches them when they are asked for, so that a list of many
    representations stays small.
    """

    packed: bytes = field(repr=False)
    logits: torch.Tensor
    token_logprobs: torch.Tensor
    greedy_ids: torch.Tensor
    tokens_loaded: int
    tokens_computed: int
    lookup_s: float = 0.0
    load_s: float = 0.0
    compute_s: float = 0.0
    store_s: float = 0.0
    _fetch: Callable[[int | None], PromptCache] = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, object]:
        # The engine stays behind: a copy in another process cannot fetch keys and values.
        return {name: value for name, value in vars(self).items() if name not in ("_fetch", "token_ids")}

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """The n token IDs. Made when first asked for: a batch returns thousands of prompts."""
        return tuple(unpack_tokens(self.packed).tolist())

    @property
    def num_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return num_tokens(self.packed)

    def past_key_values(self, num_tokens: int | None = None) -> PromptCache:
        """Return a fresh cache that the caller owns, ready for ``model(..., past_key_values=cache)``.

        Parameters
        ----------
        num_tokens : keep only so many tokens from the start; all by default.

        Returns
        -------
        PromptCache
            A ``DynamicCache`` that appends in place. Every call returns another one: transformers changes caches, and
            siblings must not see it. Pass ``attention_mask`` of full length and ``position_ids`` with it.

        Raises
        ------
        WriteBehindError, StoreError
            The store cannot be read.

        Notes
        -----
        Cost: one copy from the store's memory map (5 to 10 GB/s from the page cache), or of the cache that the engine
        still holds from the last computation. If the spans were removed meanwhile, they are computed again.
        """
        if "_fetch" not in vars(self):
            raise StoreError("this representation was pickled, and its engine stayed behind", "ask an engine again")
        return self._fetch(num_tokens)
