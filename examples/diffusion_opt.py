"""Making a diffusion model of an OPT: a training step, and a loop that fills gaps. docs/tutorials/diffusion-opt.md

Hooks take the causal mask away, so that every token sees all others. Training replaces tokens by a mask, any share of
them, and asks for those back: an absorbing-state diffusion. To fill a gap, all its tokens are masked, and in each step
those that the model is most certain of stay. Nothing of this goes through a store: it is not causal.

Run: ``python examples/diffusion_opt.py [--model PATH_OR_ID] [--steps N] [--text "... [gap] ..."]``
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tutorial import arguments, documents, load_hooked, token_blocks

from promptdb.hooks import Hook, HookedModel, PrecomputeContext
from promptdb.hooks import HookVariableNames as N

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of tokens that are masked, when it is measured
TEXT = "This module provides functions [gap 12] and the list of arguments."


def see_everything() -> list[Hook]:
    """Return hooks that put the scores from before the mask in the place of those after it."""

    def keep(scores: torch.Tensor, pctx: PrecomputeContext) -> None:
        pctx.context["scores"] = scores

    def restore(masked: torch.Tensor, pctx: PrecomputeContext) -> torch.Tensor:
        return pctx.context.pop("scores")

    return [Hook(N.PRE_MASK_ATTN_WEIGHTS, keep), Hook(N.POST_MASK_ATTN_WEIGHTS, restore)]


class Diffusion:
    """A hooked decoder that predicts masked tokens from all others.

    The logits that it had for the next token stay those of the next token: what it has learnt stays of use. So the
    first token, which none is before, is never masked.
    """

    def __init__(self, model: HookedModel, tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.model, self.tokenizer, self.mask = model, tokenizer, tokenizer.mask_token_id
        self.pctx = PrecomputeContext(model.config, see_everything())

    def predict(self, ids: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of the tokens after the first of ``[b, n]``: ``[b, n - 1, vocabulary]``."""
        logits = self.model(ids, use_cache=False, pctx=self.pctx).logits[:, :-1].float()
        logits[..., self.mask] = -torch.inf  # no text has it
        return logits.log_softmax(-1)

    def masked(self, ids: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask each token after the first with the probability of its row; return the tokens, and which they are."""
        chosen = torch.rand(ids.shape, device=ids.device) < share[:, None]
        chosen[:, 0] = False
        return ids.masked_fill(chosen, self.mask), chosen

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Return an upper bound of -log p of each token, in nats: masked ones count by 1 / the share that is masked."""
        rows = len(ids)
        share = (torch.rand(1) + torch.arange(rows) / rows) % 1  # spread evenly, which makes the loss less noisy
        share = share.clamp_min(0.02).to(ids.device)
        noisy, chosen = self.masked(ids, share)
        predicted = self.predict(noisy).gather(-1, ids[:, 1:, None])[..., 0]
        return -(predicted * chosen[:, 1:] / share[:, None]).mean()

    @torch.no_grad()
    def accuracy(self, ids: torch.Tensor, share: float) -> float:
        """Return how many of the tokens that are masked are found, all at once."""
        noisy, chosen = self.masked(ids, torch.full((len(ids),), share, device=ids.device))
        found = self.predict(noisy).argmax(-1) == ids[:, 1:]
        return float(found[chosen[:, 1:]].float().mean())

    @torch.no_grad()
    def inpaint(self, ids: torch.Tensor, num_steps: int) -> Iterator[torch.Tensor]:
        """Fill the masks of ``[n]`` tokens, in each step those that are most certain; yield the tokens after each."""
        ids = ids.clone()
        for left in range(num_steps, 0, -1):
            gap = ids == self.mask
            if not gap.any():
                return
            certainty, best = self.predict(ids[None])[0].max(-1)
            certainty[~gap[1:]] = -torch.inf
            chosen = certainty.topk(math.ceil(int(gap.sum()) / left)).indices
            ids[chosen + 1] = best[chosen]
            yield ids.clone()


def train(diffusion: Diffusion, ids: torch.Tensor, num_steps: int, lr: float) -> list[float]:
    """Train on texts ``[rows, n]``, eight at a time; return the losses."""
    model = diffusion.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, num_steps, pct_start=0.1, cycle_momentum=False)
    losses, began = [], time.perf_counter()
    for step in range(num_steps):
        loss = diffusion.loss(ids[torch.randint(0, len(ids), (8,))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            mean = sum(losses[-100:]) / len(losses[-100:])
            seconds = time.perf_counter() - began
            print(f"step {step + 1:5} of {num_steps}: at most {mean:.3f} nats per token, {seconds:.0f} s")
    model.eval()
    return losses


def with_gap(diffusion: Diffusion, text: str) -> torch.Tensor:
    """Return text as tokens, the end-of-text token first, with masks for ``[gap N]``."""
    before, _, rest = text.partition("[gap ")
    count, _, after = rest.partition("]")
    encode = diffusion.tokenizer.encode
    ids = [diffusion.tokenizer.eos_token_id, *encode(before, add_special_tokens=False)]
    ids += [diffusion.mask] * int(count or 0) + encode(after, add_special_tokens=False)
    return torch.tensor(ids, device=diffusion.model.device)


def plot(path: Path, losses: list[float], results: dict[str, list[float]]) -> None:
    """Draw the loss by step, and what share of the masked tokens is found."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = min(50, len(losses))
    smooth = torch.tensor(losses).unfold(0, width, 1).mean(1)
    left.plot(range(width, len(losses) + 1), smooth)
    left.set(xlabel="step", ylabel=f"loss, mean of {width} steps (nats per token)")
    for label, found in results.items():
        right.plot(SHARES, found, marker="o", label=label)
    right.set(xlabel="share of tokens that are masked", ylabel="of these, found", ylim=(0, None))
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return what it found."""
    parser = arguments("A diffusion model, made of a causal OPT.", prompts=4000, tokens=64, db=False)
    parser.add_argument("--steps", type=int, default=1000, help="of training, eight prompts each")
    parser.add_argument("--lr", type=float, default=6e-4, help="highest learning rate; of large models, 5e-5")
    parser.add_argument("--text", default=TEXT, help="text with a gap of N tokens, '[gap N]'")
    parser.add_argument("--inpaint-steps", type=int, default=6)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, tokenizer = load_hooked(args.model)
    diffusion = Diffusion(model, tokenizer)
    training, held_out = (
        torch.tensor(
            token_blocks(tokenizer, documents(args.texts, held_out=part), args.prompts, args.tokens),
            device=model.device,
        )
        for part in (False, True)
    )
    commonest = training.flatten().mode().values
    results = {"the commonest token": [float((held_out[:, 1:] == commonest).float().mean())] * len(SHARES)}
    results["before training"] = [diffusion.accuracy(held_out, share) for share in SHARES]
    losses = train(diffusion, training, args.steps, args.lr)
    results["after training"] = [diffusion.accuracy(held_out, share) for share in SHARES]
    print(f"\n{'of held-out tokens, found; masked':35}" + "".join(f"{share:7.0%}" for share in SHARES))
    for label, found in results.items():
        print(f"{label:35}" + "".join(f"{each:7.1%}" for each in found))

    given = with_gap(diffusion, args.text)
    print()
    filled = given
    for filled in diffusion.inpaint(given, args.inpaint_steps):
        print(tokenizer.decode(filled[1:]).replace(tokenizer.mask_token, "_"))
    plot(args.out / "diffusion_opt.png", losses, results)
    model.unhooked.save_pretrained(args.out / "diffusion-opt")
    tokenizer.save_pretrained(args.out / "diffusion-opt")
    print(f"wrote {args.out / 'diffusion-opt'} and {args.out / 'diffusion_opt.png'}")
    return {"losses": losses, "results": results, "given": given, "filled": filled, "mask": diffusion.mask}


if __name__ == "__main__":
    main()
