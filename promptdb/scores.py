"""What a model thinks of the tokens of a prompt: how probable each one is, and which one it found most probable."""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNKNOWN_ID = -1

# Logits that are scored at once on the CPU, in whole rows: they, and as much memory beside them, stay in its cache.
_SCORED_LOGITS = 1 << 21
# Logits up to here need no shift before exp: the sum over any vocabulary is a normal float32 number.
_MODERATE = 60.0


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


def token_scores(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor | None = None) -> TokenScores:
    """Return the scores of m tokens, from the logits at the tokens before them.

    Parameters
    ----------
    logits : ``[k, vocabulary]``.
    targets : ``[m]`` int64, on any device.
    rows : ``[m]`` int64, on any device: the row of each token's logits. By default token i has row i, and rows after
        the m-th are not looked at.

    Returns
    -------
    TokenScores
        Of several tokens that are equally probable, the one with the smallest ID is the greedy one. NaN in a row gives
        NaN for its log-probabilities.

    Notes
    -----
    Cost: a row is read from memory once, and computed with while it is in the cache of the CPU, at any number of
    targets. From a device, everything is copied at once.
    """
    logits, targets = logits.detach(), targets.to(logits.device)
    if rows is None:
        chosen = logits[: targets.shape[0]].gather(1, targets[:, None])[:, 0]
        shift, rest, greedy_ids = _row_scores(logits, targets.shape[0], None)
    else:
        rows = rows.to(logits.device)
        chosen = logits[rows, targets]
        used, place = torch.unique(rows, return_inverse=True)
        shift, rest, greedy_ids = (each[place] for each in _row_scores(logits, used.shape[0], used))
    both = torch.empty((2, targets.shape[0]), dtype=torch.float32, device=logits.device)
    both[0] = chosen - shift - rest
    both[1].view(torch.int32).copy_(greedy_ids)
    both = both.cpu()
    return TokenScores(both[0], both[1].view(torch.int32))


def _row_scores(
    logits: torch.Tensor, count: int, used: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, for the first or the used rows, a and b with a + b = log sum exp, and the index of the largest."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shifts = torch.empty(count, dtype=wide, device=logits.device)
    rest = torch.empty_like(shifts)
    indices = torch.empty(count, dtype=torch.int64, device=logits.device)
    on_cpu = logits.device.type == "cpu"
    rows_at_once = max(1, _SCORED_LOGITS // logits.shape[1]) if on_cpu else 256
    scratch = torch.empty((min(rows_at_once, count), logits.shape[1]), dtype=wide, device=logits.device)
    for first in range(0, count, rows_at_once):
        end = min(first + rows_at_once, count)
        rows = (logits[first:end] if used is None else logits[used[first:end]]).to(wide)
        # numpy finds the largest of a row eight times as fast as torch, which does it element by element.
        index = torch.from_numpy(rows.numpy().argmax(axis=1))[:, None] if on_cpu else rows.argmax(1, keepdim=True)
        shift = rows.gather(1, index)
        # Where the largest is moderate, exp neither overflows nor vanishes, and a pass over the rows is saved. Infinity
        # less infinity would be NaN.
        shift.masked_fill_((shift.abs() <= _MODERATE) | shift.isinf(), 0)
        out = scratch[: end - first]
        powers = torch.sub(rows, shift, out=out).exp_() if not on_cpu or shift.any() else torch.exp(rows, out=out)
        shifts[first:end] = shift[:, 0]
        rest[first:end] = powers.sum(1).log_()
        indices[first:end] = index[:, 0]
    return shifts, rest, indices
