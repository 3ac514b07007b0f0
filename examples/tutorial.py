"""What the tutorials share: arguments, a small model that is trained here, and prompts of real text."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from promptdb import PromptDB
from promptdb.demo_models import random_model
from promptdb.demo_text import corpus, demo_tokenizer
from promptdb.hooks import HookedModel

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.disable_progress_bar()

SMALL_OPT = ".demo/small-opt"
LENGTH = 128  # of the texts that it is trained on: it knows no later positions


def arguments(description: str, *, prompts: int = 48, tokens: int = 128, db: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every tutorial has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default=SMALL_OPT, help="directory or hub ID; the default is trained if it is not there")
    if db:
        add("--db", default=".demo/tutorials.promptdb", help="directory of the store")
    add("--out", type=Path, default=Path(".demo"), help="directory for what is made")
    add("--texts", type=Path, help="UTF-8 text, documents apart by blank lines; by default prose about Python")
    add("--prompts", type=int, default=prompts, help="how many prompts")
    add("--tokens", type=int, default=tokens, help="tokens of each prompt")
    return parser


def documents(path: Path | None = None, *, held_out: bool) -> list[str]:
    """Return every 25th text, on which nothing here is trained, or all others; by default prose about Python."""
    texts = (corpus() if path is None else path.read_text("utf-8")).split("\n\n")
    return texts[::25] if held_out else [text for number, text in enumerate(texts) if number % 25]


def token_blocks(tokenizer: Any, texts: list[str], count: int, length: int) -> list[list[int]]:
    """Return up to ``count`` prompts of ``length`` tokens each: texts end to end, an end-of-text token after each."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= count * length:
            break
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    blocks = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)][:count]
    if not blocks:
        raise SystemExit(f"the texts have {len(ids)} tokens, which is not one prompt of {length}")
    return blocks


def train_small_opt(directory: str | Path, texts: list[str], num_steps: int = 1500) -> float:
    """Train a causal OPT of 650,000 weights on texts, and write it with its tokenizer.

    Its tokens are letters and a few pairs of them, so it must look back to know which word it is in. Returns the loss
    of the last steps, in nats per token.
    """
    tokenizer = demo_tokenizer(texts, vocab_size=288)
    ids = torch.tensor([i for text in tokenizer(texts)["input_ids"] for i in (*text, tokenizer.eos_token_id)])
    model = random_model(
        "opt",
        vocab_size=len(tokenizer),
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=3,
        ffn_dim=512,
        max_position_embeddings=LENGTH,
        initializer_range=0.04,
        dropout=0.0,
    ).train()
    # Positions begin as waves: from random ones, it takes long to learn which token is the one before.
    with torch.no_grad():
        positions = model.model.decoder.embed_positions.weight
        waves = torch.arange(len(positions))[:, None] * torch.logspace(0, -3, positions.shape[1] // 2)
        positions.copy_(torch.cat((waves.sin(), waves.cos()), dim=1) * 0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, num_steps, pct_start=0.1, cycle_momentum=False)
    generator = torch.Generator().manual_seed(0)
    losses, began = [], time.perf_counter()
    for step in range(num_steps):
        starts = torch.randint(0, len(ids) - LENGTH, (6, 1), generator=generator)
        batch = ids[starts + torch.arange(LENGTH)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1:5} of {num_steps}: {losses[-1]:.3f} nats per token, {seconds:.0f} s")
    model.eval().save_pretrained(directory)
    tokenizer.model_max_length = LENGTH
    tokenizer.save_pretrained(directory)
    return sum(losses[-10:]) / len(losses[-10:])


def checkpoint(model: str) -> str:
    """Return the directory or hub ID of a model; the small OPT is trained where it is missing. It needs no hub."""
    if model == SMALL_OPT and not Path(model).exists():
        print(f"training a small OPT in {model}: some minutes, once")
        print(f"its loss is {train_small_opt(model, documents(held_out=False)):.2f} nats per token")
    return model


def load_hooked(model: str) -> tuple[HookedModel, Any]:
    """Load a model that takes hooks, and its tokenizer, without a store; onto the GPU where there is one."""
    path = checkpoint(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HookedModel.from_pretrained(path).to(device).eval(), AutoTokenizer.from_pretrained(path)


def describe(db: PromptDB) -> str:
    """Say what a store holds."""
    stat = db.stat()
    return f"{stat['num_tokens']:,} tokens in {stat['num_nodes']:,} spans"
