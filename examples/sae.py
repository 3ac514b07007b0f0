"""Training a sparse autoencoder from the store. docs/tutorials/sae.md

One layer's output is recorded for many prompts. From then on no model is needed: a DataLoader's workers stream shuffled
rows from the store, epoch after epoch, and an interrupted training goes on at the batch where it stopped.

Run: ``python examples/sae.py [--model PATH_OR_ID] [--layer L] [--features N] [--active K] [--epochs N]``
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from tutorial import arguments, checkpoint, describe, documents, token_blocks

from promptdb import Engine, PromptDB, Recorder
from promptdb.dataset import ActivationDataset
from promptdb.hooks import HookVariableNames as N

POINT = N.POST_MLP
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as torch and as the store say it
HELD_OUT = "held-out"  # a namespace: datasets of another one do not see its rows


class TopK(torch.nn.Module):
    """A sparse autoencoder: of ``num_features`` features it keeps the ``num_active`` strongest of each row."""

    def __init__(self, sample: torch.Tensor, num_features: int, num_active: int) -> None:
        super().__init__()
        self.num_active = num_active
        # Medians: in many models a few tokens are a hundred times as large as all others.
        self.register_buffer("mean", sample.median(0).values)
        self.register_buffer("scale", (sample - self.mean).norm(dim=1).median() / sample.shape[1] ** 0.5)
        self.encoder = torch.nn.Linear(sample.shape[1], num_features)
        self.decoder = torch.nn.Linear(num_features, sample.shape[1])
        with torch.no_grad():
            self.decoder.weight /= self.decoder.weight.norm(dim=0)
            self.encoder.weight.copy_(self.decoder.weight.T)
            self.encoder.bias.zero_()
            self.decoder.bias.zero_()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what rows ``[b, d]`` are rebuilt as, and their features ``[b, num_features]``, mostly 0."""
        strength = torch.relu(self.encoder((x - self.mean) / self.scale))
        top = strength.topk(self.num_active, dim=-1)
        features = torch.zeros_like(strength).scatter(-1, top.indices, top.values)
        return self.decoder(features) * self.scale + self.mean, features


def explained(x: torch.Tensor, rebuilt: torch.Tensor) -> float:
    """Return the share of the variance of rows that is in what they are rebuilt as."""
    return 1 - float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())


def record(engine: Engine, args: Any, *, held_out: bool) -> tuple[list[list[int]], int]:
    """Record the layer for some texts; return them as token IDs, and how many tokens went through the model."""
    texts = documents(args.texts, held_out=held_out)
    prompts = token_blocks(engine.tokenizer, texts, 16 if held_out else args.prompts, args.tokens)
    began = time.perf_counter()
    found = Recorder(engine, POINT, layers=args.layer, dtype=args.dtype).run(prompts)
    computed, seconds = sum(each.tokens_computed for each in found), time.perf_counter() - began
    label, total = HELD_OUT if held_out else "training", len(prompts) * args.tokens
    print(f"{label:9} {total:,} tokens, {computed:,} of them computed, {seconds:.1f} s")
    return prompts, computed


class Training:
    """A sparse autoencoder, its optimiser, and how far it has come; goes on from its file, if that is there."""

    def __init__(self, path: Path, data: ActivationDataset, args: Any) -> None:
        self.path, self.data = path, data
        self.epoch, self.num_batches = 0, 0  # of the epoch
        self.log: list[float] = []  # the share of the variance that was explained, by batch
        names = ("layer", "features", "active", "batch_size", "workers", "seed")
        self.setting = {name: getattr(args, name) for name in names} | {"rows": data.num_rows}
        spans = b"".join(shard.node for shard in data.shards)  # IDs, which say the model and the text
        self.setting["spans"] = hashlib.sha256(spans).hexdigest()[:16]
        torch.manual_seed(args.seed)
        self.sae = TopK(next(iter(data)).float(), args.features, args.active)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=1e-3)
        self.loader = DataLoader(data, batch_size=None, num_workers=args.workers)
        if path.exists():
            self._load()

    def _load(self) -> None:
        held = torch.load(self.path)
        if held["setting"] != self.setting:
            raise SystemExit(f"{self.path} is of a training with {held['setting']}: remove it, or give another --out")
        self.sae.load_state_dict(held["sae"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.epoch, self.num_batches, self.log = held["epoch"], held["num_batches"], held["log"]
        print(f"going on after {len(self.log)} batches: epoch {self.epoch}, batch {self.num_batches}")

    def save(self) -> None:
        """Write everything to the file, or leave it as it was."""
        state = {"sae": self.sae.state_dict(), "optimizer": self.optimizer.state_dict(), "setting": self.setting}
        state |= {"epoch": self.epoch, "num_batches": self.num_batches, "log": self.log}
        new = self.path.with_suffix(".new")
        torch.save(state, new)
        new.replace(self.path)

    def run(self, num_epochs: int, stop_after: int | None = None) -> None:
        """Train until the end of an epoch, or for so many batches."""
        left = stop_after
        while self.epoch < num_epochs and left != 0:
            self.data.resume(self.epoch, self.num_batches)
            began, first = time.perf_counter(), len(self.log)
            for batch in self.loader:
                self.step(batch.float())
                left = None if left is None else left - 1
                if left == 0:
                    break
            else:
                self.epoch, self.num_batches = self.epoch + 1, 0
            self.save()
            done, seconds = len(self.log) - first, time.perf_counter() - began
            print(f"{done} batches from the store in {seconds:.1f} s: explained variance {self.log[-1]:.3f}")

    def step(self, x: torch.Tensor) -> None:
        """Learn from rows ``[b, d]``."""
        rebuilt, _ = self.sae(x)
        loss = ((rebuilt - x) / self.sae.scale).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.sae.decoder.weight /= self.sae.decoder.weight.norm(dim=0)
        self.num_batches += 1
        self.log.append(explained(x, rebuilt.detach()))


@torch.no_grad()
def evaluate(sae: TopK, rows: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Return figures for rows that were not trained on, and how often each feature is active."""
    rebuilt, features = sae(rows)
    is_active = features > 0
    # The best that as many directions can do, if all rows must share them:
    variances = torch.linalg.svdvals(rows - rows.mean(0)).square()
    figures = {
        "explained variance": explained(rows, rebuilt),
        "explained by as many principal components": float(variances[: sae.num_active].sum() / variances.sum()),
        "L0 (active features of a row)": float(is_active.sum(1).float().mean()),
        "features that were never active": float((~is_active.any(0)).float().mean()),
    }
    return figures, is_active.float().mean(0)


def plot(path: Path, log: Sequence[float], frequency: torch.Tensor) -> None:
    """Draw the explained variance by batch, and how many features are active how often."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(log, linewidth=1)
    left.set(xlabel="batch", ylabel="explained variance", ylim=(0, 1))
    right.hist(frequency[frequency > 0].log10().numpy(), bins=40)
    right.set(xlabel="log10 of how often a feature is active", ylabel="features")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return what it found."""
    parser = arguments("A sparse autoencoder, trained from the store.", prompts=128)
    add = parser.add_argument
    add("--layer", type=int, default=1, help="whose output is learnt")
    add("--dtype", default="float32", choices=list(DTYPES), help="what rows are stored in")
    add("--features", type=int, default=512, help="of the autoencoder")
    add("--active", type=int, default=16, help="features of a row that may be active")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=1024, help="rows")
    add("--workers", type=int, default=2, help="processes that read the store")
    add("--seed", type=int, default=0)
    add("--stop-after", type=int, help="batches, to go on another time")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    with PromptDB(args.db) as db:
        path = checkpoint(args.model)
        with Engine.from_pretrained(db, path) as engine:
            _, computed = record(engine, args, held_out=False)
        with Engine.from_pretrained(db, path, namespace=HELD_OUT) as engine:
            held_out, _ = record(engine, args, held_out=True)
        rows = {"model": engine.root.weights_id, "tokenizer": engine.root.tokenizer_id, "dtype": DTYPES[args.dtype]}
        print(f"the store has {describe(db)}; the model is not needed any more")

        data = db.activation_dataset(POINT, args.layer, batch_size=args.batch_size, seed=args.seed, **rows)
        print(f"{data.num_rows:,} rows, in shuffled batches of {args.batch_size:,}, from {args.workers} workers")
        training = Training(args.out / "sae.pt", data, args)
        training.run(args.epochs, args.stop_after)
        unseen = [db.activations(prompt, POINT, args.layer, namespace=HELD_OUT, **rows) for prompt in held_out]
        figures, frequency = evaluate(training.sae, torch.cat(unseen).float())
    for label, value in figures.items():
        print(f"{label:45} {value:.3f}")
    plot(args.out / "sae.png", training.log, frequency)
    print(f"wrote {training.path} and {args.out / 'sae.png'}")
    return {"computed": computed, "figures": figures, "training": training, "rows": data.num_rows}


if __name__ == "__main__":
    main()
