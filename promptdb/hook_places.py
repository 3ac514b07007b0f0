"""Where each point is in each architecture: a table of module paths. No code of any model is copied.

A place names a module, relative to the decoder layer (or, for points outside of layers, to the decoder), and a side:

``in``    what the module's forward is given
``out``   what it returns; of a tuple the first
``sum``   what it is given, which is also the residual stream: a change must reach both
``attn``  inside of the layer's attention, reached through its attention function
``end``   of the whole model's output

A string instead of a place is the reason why the architecture has no such point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from promptdb.errors import UnsupportedModelError
from promptdb.hook_points import HookVariableNames as N

__all__ = ["Architecture", "Place", "architecture_of", "supported_architectures"]


@dataclass(frozen=True)
class Place:
    """A module's path and a side of it; see above."""

    path: str
    side: str


@dataclass(frozen=True)
class Architecture:
    """Where things are in a model.

    Attributes
    ----------
    decoder, layers, attention : paths of the decoder in the model, of its layers in the decoder, and of a layer's
        attention in the layer.
    places : by point, a place, or the reason why there is none.
    """

    decoder: str
    layers: str
    attention: str
    places: Mapping[str, Place | str]


@dataclass(frozen=True)
class _Entry:
    """One line of the table: an architecture, and what differs where a field of the configuration has a value."""

    architecture: Architecture
    variants: tuple[tuple[str, object, Mapping[str, Place | str]], ...] = field(default=())


_ATTENTION = {
    name: Place("", "attn")
    for name in (
        N.QUERY_STATES, N.KEY_STATES, N.VALUE_STATES, N.PRE_MASK_ATTN_WEIGHTS, N.POST_MASK_ATTN_WEIGHTS, N.ATTN_PROBS,
        N.ATTN_WEIGHTED_VALUES,
    )
}  # fmt: skip
_EVERYWHERE = {
    **_ATTENTION,
    N.POST_MLP: Place("", "out"),
    N.LOGITS: Place("", "end"),
    N.UNREDUCED_LOSS: Place("", "end"),
}
_PARALLEL = "attention and MLP are added to the residual stream together, so there is no stream between them"
_EXPERTS = "a mixture of experts has one for each expert that a token is sent to, and none for all"

_LLAMA = {
    **_EVERYWHERE,
    N.POST_TOK_EMBEDDINGS: Place("embed_tokens", "out"),
    N.POST_POS_EMBEDDINGS: Place("layers.0", "in"),  # positions are rotary: the same tensor
    N.PRE_ATTN: Place("self_attn", "in"),
    N.ATTN_RESIDUAL: Place("self_attn", "out"),
    N.POST_ATTN: Place("post_attention_layernorm", "sum"),
    N.PRE_MLP: Place("mlp", "in"),
    N.POST_FC1: Place("mlp.gate_proj", "out"),
    N.POST_ACT: Place("mlp.down_proj", "in"),
    N.MLP_RESIDUAL: Place("mlp", "out"),
    N.POST_FINAL_LAYER_NORM: Place("norm", "out"),
}
# Norms after each sublayer as well: what they return is added.
_SANDWICH = {
    N.ATTN_RESIDUAL: Place("post_attention_layernorm", "out"),
    N.MLP_RESIDUAL: Place("post_feedforward_layernorm", "out"),
}


def _llama(changes: Mapping[str, Place | str] | None = None) -> _Entry:
    return _Entry(Architecture("model", "layers", "self_attn", {**_LLAMA, **(changes or {})}))


_TABLE: Mapping[str, _Entry] = {
    "llama": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "mistral": _llama(),
    # Layers without experts have the modules of a plain MLP, those with experts have not: see _EXPERTS.
    "qwen3_moe": _llama(),
    "gemma2": _llama({**_SANDWICH, N.POST_ATTN: Place("pre_feedforward_layernorm", "sum")}),
    "gemma3_text": _llama({**_SANDWICH, N.POST_ATTN: Place("pre_feedforward_layernorm", "sum")}),
    # No norm before a sublayer: the MLP is given the stream itself.
    "olmo2": _llama({**_SANDWICH, N.POST_ATTN: Place("mlp", "sum")}),
    "phi": _llama(
        {
            N.POST_ATTN: _PARALLEL,
            N.POST_FC1: Place("mlp.fc1", "out"),
            N.POST_ACT: Place("mlp.fc2", "in"),
            N.POST_FINAL_LAYER_NORM: Place("final_layernorm", "out"),
        }
    ),
    "gpt2": _Entry(
        Architecture(
            "transformer",
            "h",
            "attn",
            {
                **_EVERYWHERE,
                N.POST_TOK_EMBEDDINGS: Place("wte", "out"),
                N.POST_POS_EMBEDDINGS: Place("drop", "in"),
                N.PRE_ATTN: Place("attn", "in"),
                N.ATTN_RESIDUAL: Place("attn", "out"),
                N.POST_ATTN: Place("ln_2", "sum"),
                N.PRE_MLP: Place("mlp", "in"),
                N.POST_FC1: Place("mlp.c_fc", "out"),
                N.POST_ACT: Place("mlp.c_proj", "in"),
                N.MLP_RESIDUAL: Place("mlp", "out"),
                N.POST_FINAL_LAYER_NORM: Place("ln_f", "out"),
            },
        )
    ),
    "gpt_neox": _Entry(
        Architecture(
            "gpt_neox",
            "layers",
            "attention",
            {
                **_EVERYWHERE,
                N.POST_TOK_EMBEDDINGS: Place("embed_in", "out"),
                N.POST_POS_EMBEDDINGS: Place("layers.0", "in"),
                N.PRE_ATTN: Place("attention", "in"),
                # After dropout, which is what is added.
                N.ATTN_RESIDUAL: Place("post_attention_dropout", "out"),
                N.POST_ATTN: Place("post_attention_layernorm", "sum"),
                N.PRE_MLP: Place("mlp", "in"),
                N.POST_FC1: Place("mlp.dense_h_to_4h", "out"),
                N.POST_ACT: Place("mlp.dense_4h_to_h", "in"),
                N.MLP_RESIDUAL: Place("post_mlp_dropout", "out"),
                N.POST_FINAL_LAYER_NORM: Place("final_layer_norm", "out"),
            },
        ),
        (("use_parallel_residual", True, {N.POST_ATTN: _PARALLEL}),),
    ),
    "opt": _Entry(
        Architecture(
            "model.decoder",
            "layers",
            "self_attn",
            {
                **_EVERYWHERE,
                N.POST_TOK_EMBEDDINGS: Place("embed_tokens", "out"),
                N.POST_POS_EMBEDDINGS: Place("layers.0", "in"),
                N.PRE_ATTN: Place("self_attn", "in"),
                N.ATTN_RESIDUAL: Place("self_attn", "out"),
                N.POST_ATTN: Place("final_layer_norm", "sum"),
                N.PRE_MLP: Place("fc1", "in"),
                N.POST_FC1: Place("fc1", "out"),
                N.POST_ACT: Place("fc2", "in"),
                N.MLP_RESIDUAL: Place("fc2", "out"),
                N.POST_FINAL_LAYER_NORM: Place("final_layer_norm", "out"),
            },
        ),
        (
            # 350m: norms after each addition, none at the end.
            (
                "do_layer_norm_before",
                False,
                {
                    N.POST_ATTN: Place("self_attn_layer_norm", "in"),
                    N.POST_FINAL_LAYER_NORM: "the model has no norm after its last layer",
                },
            ),
            ("_remove_final_layer_norm", True, {N.POST_FINAL_LAYER_NORM: "the model has no norm after its last layer"}),
        ),
    ),
}


def supported_architectures() -> tuple[str, ...]:
    """Return the names (``model_type``) of the architectures whose points are known."""
    return tuple(_TABLE)


def architecture_of(config: Any) -> Architecture:
    """Return where the points are in a model.

    Parameters
    ----------
    config : its configuration.

    Raises
    ------
    UnsupportedModelError
        No table for it.
    """
    entry = _TABLE.get(config.model_type)
    if entry is None:
        raise UnsupportedModelError(
            f"the named points of {config.model_type} models are not known, but those of {', '.join(_TABLE)}",
            "a module's path can be hooked in any model, such as model.layers.3.mlp",
        )
    places = dict(entry.architecture.places)
    for name, value, changes in entry.variants:
        if getattr(config, name, None) == value:
            places.update(changes)
    known = entry.architecture
    return Architecture(known.decoder, known.layers, known.attention, places)


def reason_without_module(path: str) -> str:
    """Return why a layer lacks a module that other layers of its architecture have."""
    return _EXPERTS if path.startswith("mlp.") else f"there is no {path} in that layer"
