"""What a model thinks of the tokens of a prompt: how probable each one is, and which one it found most probable."""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNKNOWN_ID = -1


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of n tokens that follow each other. A slice is a view: it shares memory with the whole.

    Attributes
    ----------
    logprobs : log-probability of each token given all before it, ``[n]`` float32 on the CPU, in nats; NaN where not
        known.
    greedy_ids : the most probable token at that place given all before it, ``[n]`` int32 on the CPU; -1 where not
        known. Nothing is known of a prompt's first token.

    Raises
    ------
    ValueError
        The tensors are not of that shape and dtype.

    Notes
    -----
    A token is the greedy one where its ID equals ``greedy_ids``. Not thread safe while it is written to.
    """

    logprobs: torch.Tensor
    greedy_ids: torch.Tensor

    def __post_init__(self) -> None:
        logprobs, greedy_ids = self.logprobs, self.greedy_ids
        if logprobs.dim() != 1 or logprobs.shape != greedy_ids.shape:
            raise ValueError(f"scores of shapes {tuple(logprobs.shape)} and {tuple(greedy_ids.shape)}")
        if (logprobs.dtype, greedy_ids.dtype) != (torch.float32, torch.int32):
            raise ValueError(f"scores of dtypes {logprobs.dtype} and {greedy_ids.dtype}")

    @classmethod
    def unknown(cls, num_tokens: int) -> TokenScores:
        """Return scores to be filled in: NaN and -1."""
        return cls(
            torch.full((num_tokens,), float("nan"), dtype=torch.float32, device="cpu"),
            torch.full((num_tokens,), UNKNOWN_ID, dtype=torch.int32, device="cpu"),
        )

    def __len__(self) -> int:
        return self.logprobs.shape[0]

    def __getitem__(self, part: slice) -> TokenScores:
        return TokenScores(self.logprobs[part], self.greedy_ids[part])

    def __setitem__(self, part: slice, scores: TokenScores) -> None:
        target = self[part]
        if len(target) != len(scores):  # torch would repeat a single one
            raise ValueError(f"{len(scores)} scores for {len(target)} tokens")
        target.logprobs.copy_(scores.logprobs)
        target.greedy_ids.copy_(scores.greedy_ids)

    def clone(self) -> TokenScores:
        """Return a copy that shares no memory."""
        return TokenScores(self.logprobs.clone(), self.greedy_ids.clone())
