"""Small language models that need no model hub: random ones for tests and benchmarks, a trained one for demos.

Every architecture that promptdb is tested on has a tiny configuration here (:data:`ARCHITECTURES`), and some have the
shapes of well-known checkpoints (:data:`SIZES`). :func:`write_demo_model` trains a small Llama-style model on the
docstrings of Python's standard library, which every machine has, and writes it in Hugging Face format.

torch, transformers and tokenizers are imported where they are used.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import os
import re
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from promptdb.errors import InputTypeError, ModelError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "ARCHITECTURES",
    "SIZES",
    "DemoReport",
    "byte_tokenizer",
    "corpus",
    "demo_tokenizer",
    "random_model",
    "write_demo_model",
]

END_OF_TEXT = "<|endoftext|>"  # always token 0: beginning and end of sequence
PADDING = "<|pad|>"  # always token 1: apart from the end of text, so that a mask can be told from the IDs

VOCAB_SIZE = 2048  # of the trained model: small enough that its output layer does not eat the training time
NUM_STEPS = 120

_KV2 = {"num_key_value_heads": 2}
_GQA = {"num_key_value_heads": 2, "head_dim": 16}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "n_inner": 128}

# What each tiny configuration changes in _TINY_BASE. Windows of 16 are shorter than the prompts of any honest test.
_TINY_BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
}
_TINY: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "llama": _KV2,
    "qwen2": _KV2,
    "qwen3": _GQA,
    "mistral": _KV2 | {"sliding_window": 16},
    "gemma2": _GQA | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": _GQA | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {},
    "falcon": {},
    "olmo2": {},
    "qwen3_moe": _GQA | _MOE | {"moe_intermediate_size": 64},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    # The awkward ones: recurrent state, convolutions, ALiBi, old code.
    "qwen3_next": _GQA
    | _MOE
    | {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba": {"state_size": 8},
    "lfm2": _KV2 | {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": _KV2
    | {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 1024},
    "gptj": _GPT2 | {"rotary_dim": 8},
}

ARCHITECTURES: tuple[str, ...] = tuple(_TINY)
"""Names that :func:`random_model` takes: ``model_type`` in the configurations of transformers."""

_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _gpt2(n_layer: int, n_embd: int, n_head: int) -> dict[str, Any]:
    return {"vocab_size": 50257, "n_positions": 1024, "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}


def _llama3(layers: int, hidden: int, heads: int, ffn: int, rope_factor: float, *, tied: bool) -> dict[str, Any]:
    return _LLAMA3 | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "tie_word_embeddings": tied,
        "rope_parameters": _LLAMA3_ROPE | {"factor": rope_factor},
    }


SIZES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "tiny": ("gpt2", _TINY_BASE | _GPT2),
        "gpt2": ("gpt2", _gpt2(12, 768, 12)),
        "gpt2-medium": ("gpt2", _gpt2(24, 1024, 16)),
        "gpt2-xl": ("gpt2", _gpt2(48, 1600, 25)),
        "qwen3-0.6b": (
            "qwen3",
            {
                "vocab_size": 151936,
                "hidden_size": 1024,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 3072,
                "max_position_embeddings": 40960,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "tie_word_embeddings": True,
            },
        ),
        "llama-1b": ("llama", _llama3(16, 2048, 32, 8192, 32.0, tied=True)),
        "llama-3b": ("llama", _llama3(28, 3072, 24, 8192, 32.0, tied=True)),
        "llama-8b": ("llama", _llama3(32, 4096, 32, 14336, 8.0, tied=False)),
    }
)
"""Shapes of well-known checkpoints, by name: ``(architecture, configuration)``."""


def random_model(
    arch: str | None = None,
    *,
    size: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    **config_overrides: Any,
) -> PreTrainedModel:
    """Build a causal language model with random weights, in eval mode.

    Parameters
    ----------
    arch : one of :data:`ARCHITECTURES`; ``"gpt2"`` if neither it nor ``size`` is given.
    size : one of :data:`SIZES`; without it the model is tiny: 2 layers, 64 wide, 512 tokens, 1024 positions.
    seed : of the weights. The same seed, device and library versions give the same weights.
    dtype : of the weights; float32 if not given.
    device : where the weights are drawn and stay. Drawing 8 billion numbers on a CPU takes minutes.
    **config_overrides : fields of the configuration, for example ``num_hidden_layers=3``.

    Returns
    -------
    PreTrainedModel
        Tiny models have weights large enough that logits depend visibly on every earlier token. Token 0 begins and
        ends a sequence, token 1 pads, as in :func:`byte_tokenizer`.

    Raises
    ------
    UnsupportedModelError
        ``arch`` is not one of :data:`ARCHITECTURES`.
    ModelError
        ``size`` is not one of :data:`SIZES`, or is of another architecture than ``arch``.

    Notes
    -----
    The global state of torch's random numbers is left as it was.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    arch, settings = _settings(arch, size)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model(arch, **(special | settings | config_overrides))
    dtype = torch.float32 if dtype is None else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _settings(arch: str | None, size: str | None) -> tuple[str, dict[str, Any]]:
    if arch is not None and arch not in _TINY:
        raise UnsupportedModelError(f"no architecture {arch!r} here", f"choose one of: {', '.join(ARCHITECTURES)}")
    if size is None:
        # Weights of the usual 0.02 in so narrow a model give nearly constant logits, on which wrong code passes.
        return arch or "gpt2", _TINY_BASE | {"initializer_range": 0.15} | _TINY[arch or "gpt2"]
    if size not in SIZES:
        raise ModelError(f"no size {size!r}", f"choose one of: {', '.join(SIZES)}")
    size_arch, settings = SIZES[size]
    if arch not in (None, size_arch):
        raise ModelError(f"size {size!r} is of architecture {size_arch!r}, not {arch!r}", "give only one of the two")
    return size_arch, dict(settings)


def demo_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any Unicode text round-trips, and nothing is unknown.

    Parameters
    ----------
    texts : what to learn merges from.
    vocab_size : most tokens that it may have, at least 258: 256 bytes, ``<|endoftext|>`` (0) and ``<|pad|>`` (1).

    Returns
    -------
    PreTrainedTokenizerFast
        The same for the same texts. It adds no special tokens to what it encodes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if isinstance(texts, str):
        raise InputTypeError("texts is one str", "give an iterable of str, for example [text]")
    if vocab_size < 258:
        raise ModelError(f"a vocabulary of {vocab_size} cannot hold all bytes", "give a vocab_size of 258 or more")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


_PARAGRAPH = """\
The cache keeps what the model has read, so that the next prompt which begins with the same words need not be read
again. A prompt is a list of tokens; a span of tokens is stored once, under the hash of all that comes before it. When
another prompt parts from the first one, only the rest of the text is computed, and the store has both of them. Return
the number of tokens that were loaded and the number of tokens that were computed. Hello there, and thank you.
"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, trained in milliseconds on a fixed paragraph; fits tiny models' 512 tokens.

    Any Unicode text round-trips; characters outside ASCII take several tokens, and so do most words.
    """
    return demo_tokenizer([_PARAGRAPH], vocab_size=384)


# Test text is not prose, encodings are tables, and the rest is old or says the same again.
_SKIPPED = {"test", "tests", "encodings", "distutils", "idlelib", "lib2to3", "turtledemo"}


@functools.cache
def corpus(max_chars: int = 2_000_000) -> str:
    """Collect prose about Python from this machine: docstrings and help topics of the standard library.

    Parameters
    ----------
    max_chars : the text ends with the last document that fits.

    Returns
    -------
    str
        Documents with a blank line between them, in the order of their module paths; each paragraph is one line, and
        code and tables are left out. About 1.3 million characters, the same for one version of Python.

    Notes
    -----
    Sources are parsed, never imported. About 3 seconds the first time in a process.
    """
    kept: list[str] = []
    num_chars = 0
    for document in _documents():
        num_chars += len(document) + 2
        if num_chars > max_chars:
            break
        kept.append(document)
    return "\n\n".join(kept)


def _documents() -> Iterator[str]:
    seen: set[str] = set()
    for path in _stdlib_files():
        source = path.read_text("utf-8", errors="replace")
        topics = path.name == "topics.py"  # one dict of help texts
        # A file with little text for its length would cost more time than it gives words.
        if not topics and source.count('"""') * 1500 < len(source):
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for text in _strings(tree) if topics else _docstrings(tree):
            prose = _prose(text)
            if prose and prose not in seen:
                seen.add(prose)
                yield prose


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        # Not packages: site-packages, config-3.11-x86_64-linux-gnu.
        folders[:] = [name for name in folders if name.isidentifier() and name not in _SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _strings(tree: ast.AST) -> Iterator[str]:
    return (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
            todo += reversed(node.body)


def _prose(text: str) -> str:
    kept = []
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        num_plain = sum(char.isalpha() or char == " " for char in paragraph)
        looks_like_code = ">>>" in paragraph or "::" in paragraph or num_plain < 0.9 * len(paragraph)
        if len(paragraph) > 15 and " " in paragraph and paragraph[0].isalpha() and not looks_like_code:
            kept.append(paragraph)
    return "\n".join(kept)


@dataclass(frozen=True)
class DemoReport:
    """What :func:`write_demo_model` wrote."""

    directory: Path
    architecture: str
    num_parameters: int
    vocab_size: int
    """Tokens of the tokenizer; the model may have more."""
    size_bytes: int
    """Of all files together."""
    seconds: float
    num_tokens_trained: int = 0
    """Tokens read while training, repetitions included."""
    loss: float | None = None
    """Mean of the last steps, in nats per token; None if nothing was trained."""
    heldout_loss: float | None = None
    """On documents that were not trained on, in nats per token."""


_MARKER = "demo.json"  # tells our directories from a checkpoint that somebody trained for a month
_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    _MARKER,
}


def write_demo_model(
    directory: str | os.PathLike[str],
    *,
    arch: str | None = None,
    size: str | None = None,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    max_chars: int = 2_000_000,
    overwrite: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> DemoReport:
    """Write a small language model and its tokenizer in Hugging Face format, with no network.

    Parameters
    ----------
    directory : where to; parents are created. It is renamed into place when complete.
    arch, size : as for :func:`random_model`. With either of them the weights are random and nothing is trained;
        without, a Llama-style model is trained on :func:`corpus`.
    seed : of weights and training order.
    num_steps : training steps of 1,024 tokens each, after the embeddings are fitted.
    max_chars : most characters of :func:`corpus` to train on.
    overwrite : replace an earlier demo model.
    progress : called with (steps done, steps in all, loss) after each step.

    Returns
    -------
    DemoReport

    Raises
    ------
    ModelError
        ``directory`` holds something that is not a demo model, or one without ``overwrite``; ``num_steps`` is negative;
        there is no source text of the standard library to train on; or as :func:`random_model`.

    Notes
    -----
    The default takes some 40 seconds on a slow CPU. The files are the same, bit by bit, for the same arguments on one
    machine with the same versions of Python and torch. Training uses one thread, because the order of sums depends on
    the number of threads; torch's settings are restored.
    """
    started = time.perf_counter()
    target = Path(directory).absolute()
    _check_target(target, overwrite=overwrite)
    if num_steps < 0:
        raise ModelError(f"num_steps is {num_steps}", "give 0 or more")
    losses: dict[str, Any] = {}
    if arch is None and size is None:
        documents = corpus(max_chars).split("\n\n")
        model, tokenizer, losses = _train(documents, seed, num_steps, progress or (lambda *_: None))
    else:
        model = random_model(arch, size=size, seed=seed)
        fits = model.config.vocab_size >= VOCAB_SIZE
        tokenizer = demo_tokenizer(corpus(max_chars).split("\n\n")) if fits else byte_tokenizer()
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", 1024)

    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}.new")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        with _quiet():
            model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        about = {"promptdb_demo": 1, "arch": model.config.model_type, "size": size, "seed": seed} | losses
        (staged / _MARKER).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
        _check_target(target, overwrite=overwrite)  # again: training took its time
        if target.exists():
            target.rename(replaced)
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    return DemoReport(
        directory=target,
        architecture=model.config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=len(tokenizer),
        size_bytes=sum(path.stat().st_size for path in target.iterdir()),
        seconds=time.perf_counter() - started,
        **losses,
    )


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    names = {path.name for path in target.iterdir()} if target.is_dir() else {""}
    if names and (_MARKER not in names or names - _FILES):
        others = ", ".join(sorted(names - _FILES)[:3]) or "a model that is not a demo model"
        raise ModelError(f"{target} holds {others if target.is_dir() else 'a file'}", "choose a new or empty directory")
    if names and not overwrite:
        raise ModelError(f"{target} holds a demo model already", "pass overwrite=True, or --overwrite, to replace it")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()  # "Writing model shards: 100%" for one file
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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


def _train(
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
