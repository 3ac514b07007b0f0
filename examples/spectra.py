"""Power spectra of a transformer's hidden states, layer by layer. docs/tutorials/spectra.md

How fast do hidden states change along a text, and does that differ by depth? Every layer's output is recorded once into
the store, read back from there, and Fourier transformed along the positions. A second run computes nothing.

Run: ``python examples/spectra.py [--model PATH_OR_ID] [--prompts N] [--tokens N]``
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from tutorial import arguments, checkpoint, describe, documents, token_blocks

from promptdb import Engine, PromptDB, Recorder
from promptdb.hooks import HookVariableNames as N

SHUFFLED = "shuffled"  # a namespace of its own: nobody who looks for rows of real text finds these
SKIPPED = 8  # of each prompt: many models give their first tokens outputs that drown all others

Where = tuple[str, int | None]  # a point and its layer
Spectrum = tuple[torch.Tensor, torch.Tensor]  # frequencies and powers


def shuffled(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the same tokens in random order: what is left of a spectrum then is the model's doing, not the text's."""
    return [random.Random(number).sample(ids, len(ids)) for number, ids in enumerate(prompts)]


def record(engine: Engine, prompts: Sequence[list[int]]) -> tuple[tuple[Where, ...], int]:
    """Record what the first layer gets and what each layer returns; return these points, and the tokens computed."""
    began = time.perf_counter()
    found = Recorder(engine, [N.POST_POS_EMBEDDINGS, N.POST_MLP]).run(prompts)
    computed, seconds = sum(each.tokens_computed for each in found), time.perf_counter() - began
    num_tokens = sum(map(len, prompts))
    print(f"{engine.namespace or 'text':9} {num_tokens:,} tokens, {computed:,} of them computed, {seconds:.1f} s")
    return found[0].points, computed


def spectrum(db: PromptDB, root: dict[str, str], prompts: Sequence[list[int]], where: Where) -> Spectrum:
    """Return frequencies, in cycles per token, and the power at each: the mean over prompts and dimensions.

    The mean is taken off, and a window keeps a text's two ends from looking like a jump: both blur the first two
    frequencies, which are left out. Of white noise, all powers would be 1.
    """
    total = torch.zeros((), dtype=torch.float64)
    for prompt in prompts:
        x = db.activations(prompt, *where, positions=slice(SKIPPED, None), **root).double()  # [n, d]
        window = torch.hann_window(len(x), dtype=torch.float64)[:, None]
        total = total + torch.fft.rfft((x - x.mean(0)) * window, dim=0).abs().square().mean(1)
    power = total[2:]
    return torch.fft.rfftfreq(len(x))[2:], power / power.mean()


def slow_share(spectrum: Spectrum) -> float:
    """Return the share of the power that is in periods of 16 tokens and more."""
    frequencies, power = spectrum
    return float(power[frequencies <= 1 / 16].sum() / power.sum())


def smooth(spectrum: Spectrum, num_bands: int = 24) -> Spectrum:
    """Return the means over bands that are equally wide in octaves; those without a frequency are left out."""
    frequencies, power = spectrum
    edges = torch.logspace(float(frequencies[0].log2()), -1, num_bands, base=2)
    bands = torch.bucketize(frequencies, edges)
    members = [bands == band for band in bands.unique()]
    return tuple(torch.stack([each[chosen].mean() for chosen in members]) for each in (frequencies, power))


def plot(path: Path, texts: dict[Where, Spectrum], controls: dict[Where, Spectrum]) -> None:
    """Draw a line for each layer, and a dashed one for the same tokens in random order."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"](torch.linspace(0, 0.9, len(texts)).numpy())
    for where, colour in zip(texts, colours, strict=True):
        axes.plot(*smooth(texts[where]), color=colour, label=name(where))
        axes.plot(*smooth(controls[where]), color=colour, linestyle="--", linewidth=0.8)
    axes.plot([], [], color="grey", linestyle="--", linewidth=0.8, label="tokens shuffled")
    axes.set(xlabel="frequency (cycles per token)", ylabel="power (white noise: 1)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"1/{1 / x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def name(where: Where) -> str:
    """Name a point for people."""
    return "into the first layer" if where[1] is None else f"after layer {where[1]}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return what it found."""
    args = arguments("Power spectra of hidden states, layer by layer.").parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = checkpoint(args.model)
    with PromptDB(args.db) as db:
        with Engine.from_pretrained(db, path) as engine:
            prompts = token_blocks(engine.tokenizer, documents(args.texts, held_out=False), args.prompts, args.tokens)
            points, computed = record(engine, prompts)
        with Engine.from_pretrained(db, path, namespace=SHUFFLED) as engine:
            computed += record(engine, shuffled(prompts))[1]
        print(f"the store has {describe(db)}")
        root = {"model": engine.root.weights_id, "tokenizer": engine.root.tokenizer_id}

    with PromptDB(args.db, readonly=True) as db:  # from here on, no model
        texts = {where: spectrum(db, root, prompts, where) for where in points}
        root["namespace"] = SHUFFLED
        controls = {where: spectrum(db, root, shuffled(prompts), where) for where in points}
    print(f"\n{'share of power in periods >= 16 tokens':40} {'text':>7} {'shuffled':>9}")
    for where in points:
        print(f"{name(where):40} {slow_share(texts[where]):7.1%} {slow_share(controls[where]):9.1%}")
    plot(args.out / "spectra.png", texts, controls)
    print(f"wrote {args.out / 'spectra.png'}")
    return {"computed": computed, "prompts": prompts, "texts": texts, "controls": controls}


if __name__ == "__main__":
    main()
