"""Bypassing the causal mask: a decoder that sees what comes next. docs/tutorials/no-causal-mask.md

A hook on the scores before the mask and one on those after it let every token attend to some tokens after it. Measured:
the loss, and how far the predictions of a text's first half move when its second half is replaced. Nothing of this may
be stored, and the store says why.

Run: ``python examples/no_causal_mask.py [--model PATH_OR_ID] [--prompts N] [--tokens N]``
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tutorial import arguments, describe, documents, load_hooked, token_blocks

from promptdb import Engine, PromptDB
from promptdb.errors import UnsupportedModelError
from promptdb.hooks import Hook, HookedModel, PrecomputeContext
from promptdb.hooks import HookVariableNames as N
from promptdb.interventions import Intervention


def look_ahead(num_tokens: int) -> list[Hook]:
    """Return hooks that let every token attend to that many tokens after it, besides those before it."""

    def keep(scores: torch.Tensor, pctx: PrecomputeContext) -> None:
        pctx.context["scores"] = scores

    def unmask(masked: torch.Tensor, pctx: PrecomputeContext) -> torch.Tensor:
        scores = pctx.context.pop("scores")  # of the same layer: its mask has just been added
        new, total = scores.shape[-2:]
        of = pctx.first_position + torch.arange(new, device=scores.device)[:, None]
        ahead = torch.arange(total, device=scores.device) - of
        return torch.where((ahead > 0) & (ahead <= num_tokens), scores, masked)

    return [Hook(N.PRE_MASK_ATTN_WEIGHTS, keep), Hook(N.POST_MASK_ATTN_WEIGHTS, unmask)]


@torch.no_grad()
def log_probabilities(model: HookedModel, ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return those of all next tokens, ``[batch, n, vocabulary]``, with a look ahead of so many tokens."""
    pctx = PrecomputeContext(model.config, look_ahead(num_tokens) if num_tokens else [])
    return model(ids, use_cache=False, pctx=pctx).logits.float().log_softmax(-1)


def loss(predicted: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the mean of -log p of each token after the first, in nats."""
    return -float(predicted[:, :-1].gather(-1, ids[:, 1:, None]).mean())


def movement(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return how far next-token distributions moved: the total variation, in [0, 1], by position."""
    return (before.exp() - after.exp()).abs().sum(-1).mean(0) / 2


def refusal(db: PromptDB, model: HookedModel, tokenizer: Any, hooks: list[Hook]) -> str:
    """Try to give the hooks to an engine, which would store what it computes; return why it does not."""
    try:
        with Engine(db, model.unhooked, tokenizer, intervention=Intervention("look-ahead", hooks)):
            raise RuntimeError("the engine took hooks that are not causal")
    except UnsupportedModelError as error:
        return str(error)


def plot(path: Path, losses: dict[int, float], moved: dict[int, torch.Tensor]) -> None:
    """Draw the losses, and the movement before the place where the text was changed."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(len(losses)), list(losses.values()), color="tab:blue")
    left.set_xticks(range(len(losses)), [str(each) for each in losses])
    left.set(xlabel="tokens that may be seen ahead", ylabel="loss (nats per token)")
    for each, by_position in moved.items():
        if each:  # causal: nothing moves
            shown = by_position[-64:].cpu()
            right.plot(range(-len(shown), 0), shown, label=str(each), marker=".", markersize=3)
    right.set(yscale="log", ylim=(1e-5, 1), xlabel="position before the change", ylabel="movement of predictions")
    right.legend(title="seen ahead", fontsize="small", loc="lower left")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return what it found."""
    parser = arguments("A decoder without its causal mask.", prompts=16)
    parser.add_argument("--ahead", type=int, nargs="+", default=[1, 2, 4, 16], help="numbers of tokens to look ahead")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_hooked(args.model)
    blocks = token_blocks(tokenizer, documents(args.texts, held_out=True), args.prompts, args.tokens)
    ids = torch.tensor(blocks, device=model.device)
    half = ids.shape[1] // 2
    changed = torch.cat((ids[:, :half], ids[:, half:].roll(1, 0)), dim=1)  # another text's second half

    losses, moved = {}, {}
    print(f"{'seen ahead':>10} {'loss':>7} {'moved':>7}  positions that moved, of the {half} before the change")
    for each in [0, *args.ahead, ids.shape[1]]:
        predicted = log_probabilities(model, ids, each)
        losses[each] = loss(predicted, ids)
        moved[each] = movement(predicted, log_probabilities(model, changed, each))[:half]
        count = int((moved[each] > 1e-5).sum())
        print(f"{each:10} {losses[each]:7.3f} {float(moved[each].max()):7.3f}  {count}")

    with PromptDB(args.db) as db:
        before = db.stat()["num_nodes"]
        reason = refusal(db, model, tokenizer, look_ahead(ids.shape[1]))
        print(f"\nThe store refuses to keep any of it:\n  {reason}\n(it has {describe(db)}, as before)")
        stored = db.stat()["num_nodes"] - before
    plot(args.out / "no_causal_mask.png", losses, moved)
    print(f"wrote {args.out / 'no_causal_mask.png'}")
    return {"losses": losses, "moved": moved, "half": half, "reason": reason, "stored": stored}


if __name__ == "__main__":
    main()
