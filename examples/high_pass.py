"""High-pass filters on attention residuals: what is slow in them, and does it matter? docs/tutorials/high-pass.md

Three filters along the sequence. One drops low frequencies of what attention adds, by Fourier transform: a position
then depends on later ones. One subtracts the mean of what attention has added so far: causal, but it needs rows that no
cache has. One subtracts the mean of the values that attention reads: those are in the cache. Only what the last one
makes of a prompt may be stored.

Run: ``python examples/high_pass.py [--model PATH_OR_ID] [--prompts N] [--tokens N] [--prompt TEXT]``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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

PERIODS = (128, 64, 32, 16, 8, 4, 2)  # tokens: the longest that a filter lets through


def fourier(x: torch.Tensor, pctx: PrecomputeContext, *, cutoff: float) -> torch.Tensor:
    """Drop frequencies below the cut-off, in cycles per token, from ``[b, n, d]``. Rows depend on all others."""
    spectrum = torch.fft.rfft(x.float(), dim=1)
    kept = torch.fft.rfftfreq(x.shape[1], device=x.device) >= cutoff
    return torch.fft.irfft(spectrum * kept[:, None], n=x.shape[1], dim=1)


def minus_mean_so_far(x: torch.Tensor, pctx: PrecomputeContext) -> torch.Tensor:
    """Subtract the mean of all rows up to each from ``[b, n, d]``. Rows depend on those before them."""
    count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
    return x - x.cumsum(1) / count


def minus_mean_value(probs: torch.Tensor, pctx: PrecomputeContext) -> torch.Tensor:
    """Subtract uniform attention from ``[b, h, n, N]``: positions read values less the mean of those they may see."""
    new, total = probs.shape[-2:]
    position = pctx.first_position + torch.arange(new, device=probs.device)[:, None]
    visible = torch.arange(total, device=probs.device) <= position
    return probs - visible / (position + 1)


def silence(x: torch.Tensor, pctx: PrecomputeContext) -> torch.Tensor:
    """Let attention add nothing: what any filter is to be compared with."""
    return x * 0


FILTERS: dict[str, Hook] = {
    "Fourier, periods <= 16": Hook(N.ATTN_RESIDUAL, partial(fourier, cutoff=1 / 16)),
    "minus mean so far": Hook(N.ATTN_RESIDUAL, minus_mean_so_far),
    "minus mean value": Hook(N.ATTN_PROBS, minus_mean_value),
}


@torch.no_grad()
def loss(model: HookedModel, ids: torch.Tensor, hooks: Sequence[Hook] = ()) -> float:
    """Return the loss on prompts ``[b, n]``, in nats per token, under hooks."""
    return float(model(ids, labels=ids, use_cache=False, pctx=PrecomputeContext(model.config, hooks)).loss)


def stored_loss(engine: Engine, prompts: Sequence[list[int]]) -> tuple[float, int]:
    """Return the same through an engine, and how many tokens it had to compute: none that are stored."""
    found = [engine.get(prompt) for prompt in prompts]
    total = sum(float(each.token_logprobs.sum()) for each in found)
    return -total / sum(len(each.token_logprobs) for each in found), sum(each.tokens_computed for each in found)


def offer(db: PromptDB, model: HookedModel, tokenizer: Any, label: str, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Offer a filter to an engine, which stores what it computes, if it takes it; return what came of it."""
    try:
        engine = Engine(db, model.unhooked, tokenizer, intervention=Intervention(label, [FILTERS[label]]))
    except UnsupportedModelError as error:
        print(f"\n{label}: refused.\n  {error}")
        return {"refused": str(error)}
    with engine:
        first, again = stored_loss(engine, prompts), stored_loss(engine, prompts)
    print(f"\n{label}: stored under a root of its own.")
    print(f"  loss {first[0]:.3f}; {first[1]:,} tokens computed the first time, {again[1]} the second")
    return {"loss": first[0], "computed": first[1], "computed_again": again[1]}


@torch.no_grad()
def continuation(model: HookedModel, tokenizer: Any, prompt: str, hooks: Sequence[Hook] = ()) -> str:
    """Return what a model goes on with. Without a cache, so that filters see the whole sequence at every step."""
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    pctx = PrecomputeContext(model.config, hooks)
    made = model.generate(**given, max_new_tokens=40, do_sample=False, use_cache=False, pctx=pctx)
    return tokenizer.decode(made[0, given["input_ids"].shape[1] :])


def plot(path: Path, by_period: dict[int, float], lines: dict[str, float]) -> None:
    """Draw the loss by what the Fourier filter lets through, and lines for what else was measured."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(by_period)), list(by_period.values()), marker="o", label="Fourier")
    for number, (label, value) in enumerate(lines.items()):
        axes.axhline(value, color=f"C{number + 1}", linestyle="--", linewidth=1, label=label)
    axes.set_xticks(range(len(by_period)), [str(each) for each in by_period])
    axes.set(xlabel="longest period that is let through (tokens)", ylabel="loss (nats per token)")
    axes.legend(fontsize="small", loc="center left")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return what it found."""
    parser = arguments("High-pass filters on attention residuals.", prompts=16)
    parser.add_argument("--prompt", default="Return the number of", help="text to be continued")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_hooked(args.model)
    prompts = token_blocks(tokenizer, documents(args.texts, held_out=True), args.prompts, args.tokens)
    measure: Callable[..., float] = partial(loss, model, torch.tensor(prompts, device=model.device))

    lines = {"no filter": measure(), "no attention": measure([Hook(N.ATTN_RESIDUAL, silence)])}
    lines |= {label: measure([FILTERS[label]]) for label in ("minus mean so far", "minus mean value")}
    by_period = {period: measure([Hook(N.ATTN_RESIDUAL, partial(fourier, cutoff=1 / period))]) for period in PERIODS}
    for label, value in lines.items():
        print(f"{label:30} {value:.3f} nats per token")
    for period, value in by_period.items():
        print(f"Fourier, periods <= {period:<10} {value:.3f}")

    print(f"\n{args.prompt!r} goes on")
    for label, hooks in {"no filter": [], **{label: [hook] for label, hook in FILTERS.items()}}.items():
        print(f"  {label + ':':24} {continuation(model, tokenizer, args.prompt, hooks)!r}")

    with PromptDB(args.db) as db:
        offers = {label: offer(db, model, tokenizer, label, prompts) for label in FILTERS}
        print(f"\nThe store has {describe(db)}.")
    plot(args.out / "high_pass.png", by_period, lines)
    print(f"wrote {args.out / 'high_pass.png'}")
    return {"lines": lines, "by_period": by_period, "offers": offers}


if __name__ == "__main__":
    main()
