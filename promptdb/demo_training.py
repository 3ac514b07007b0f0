"""Training the demo model: deterministic, on one thread, in less than a minute."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from promptdb.demo_models import random_model
from promptdb.demo_text import VOCAB_SIZE, demo_tokenizer
from promptdb.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    import torch

    num_threads = torch.get_num_threads()
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.set_num_threads(num_threads)


_FitProgress = Callable[[int, float], None]

_BATCH, _LENGTH, _LONG = 8, 128, 1024  # every tenth step reads one long sequence in place of eight short ones
_FIT_STEPS = 40


def train(
    documents: list[str], seed: int, num_steps: int, progress: Callable[[int, int, float], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """Train in two stages: embeddings on all pairs of neighbouring tokens at once, then everything on sequences.

    Half a minute of a CPU is some 200,000 tokens, too few to learn words and grammar together from noise. The bigram
    counts of the whole text fit in one matrix, and with the blocks' outputs at zero the model is a bigram model.
    """
    import torch

    if sum(map(len, documents)) < 50_000:
        raise ModelError("the standard library's source text is missing here", "write a random model: --arch llama")
    tokenizer = demo_tokenizer(documents)

    def encode(texts: list[str]) -> torch.Tensor:
        return torch.tensor([i for item in tokenizer.backend_tokenizer.encode_batch(texts) for i in (*item.ids, 0)])

    with _deterministic():
        train = encode([text for number, text in enumerate(documents) if number % 25])
        heldout = encode(documents[::25])
        model = random_model(
            "llama",
            seed=seed,
            vocab_size=VOCAB_SIZE,
            hidden_size=192,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=512,
            max_position_embeddings=2048,
            initializer_range=0.03,
            tie_word_embeddings=False,
        ).train()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        _fit_bigrams(model, train, seed, lambda step, loss: progress(step, _FIT_STEPS + num_steps, loss))

        embeddings = [model.model.embed_tokens.weight, model.lm_head.weight]
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        norms = [p for p in model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "lr": 3e-3, "weight_decay": 0.1},
            {"params": norms, "lr": 3e-3},
            {"params": embeddings, "lr": 1e-4},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / 15) * (0.525 + 0.475 * math.cos(math.pi * step / max(1, num_steps))),
        )
        generator = torch.Generator().manual_seed(seed)
        recent: list[float] = []
        for step in range(num_steps):
            batch, length = (1, _LONG) if step % 10 == 9 else (_BATCH, _LENGTH)
            starts = torch.randint(0, len(train) - length, (batch, 1), generator=generator)
            loss = _loss(model, train[starts + torch.arange(length + 1)])
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent = [*recent[-15:], loss.item()]
            progress(_FIT_STEPS + step + 1, _FIT_STEPS + num_steps, recent[-1])
        model.eval()
        with torch.no_grad():
            windows = heldout[: (len(heldout) - 1) // _LENGTH * _LENGTH + 1].unfold(0, _LENGTH + 1, _LENGTH)
            heldout_loss = sum(float(_loss(model, window[None])) for window in windows) / len(windows)
    losses = {
        "num_tokens_trained": num_steps * _BATCH * _LENGTH,
        "loss": sum(recent) / len(recent) if recent else None,
        "heldout_loss": heldout_loss,
    }
    return model, tokenizer, losses


def _fit_bigrams(model: PreTrainedModel, tokens: torch.Tensor, seed: int, progress: _FitProgress) -> None:
    """Fit input and output embeddings to the smoothed counts of neighbouring tokens: each step sees the whole text."""
    import torch

    size = VOCAB_SIZE
    counts = torch.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).view(size, size).double()
    firsts = counts.sum(1, keepdim=True)
    unigrams = (counts.sum(0) + 1) / (counts.sum() + size)
    joint = ((counts + 30 * unigrams) / (firsts + 30) * firsts / firsts.sum()).float()

    inputs, outputs = model.model.embed_tokens.weight, model.lm_head.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        inputs.normal_(0, 1, generator=generator)
        outputs.normal_(0, 0.02, generator=generator)
    optimizer = torch.optim.AdamW([inputs, outputs], lr=0.04, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(_FIT_STEPS):
        optimizer.param_groups[0]["lr"] = 0.04 * (1 - step / _FIT_STEPS)
        loss = -(joint * torch.log_softmax(model.model.norm(inputs) @ outputs.T, -1)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, loss.item())
    model.zero_grad()


def _loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    import torch

    logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
