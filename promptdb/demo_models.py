"""Language models with random weights, for tests and benchmarks that need no model hub.

Every architecture that promptdb is tested on has a tiny configuration (:data:`ARCHITECTURES`), and some have the shapes
of well-known checkpoints (:data:`SIZES`). torch and transformers are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from promptdb.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["ARCHITECTURES", "SIZES", "random_model"]

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
