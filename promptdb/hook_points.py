"""Names of the variables of a forward pass that hooks may read and change, and what is known of each without a model.

Letters of shapes: b batch, n new tokens, N past and new tokens, h heads, c head size, d hidden size, f width of the
feed-forward layer, v vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from promptdb.errors import InputTypeError

__all__ = ["POINTS", "HookVariableNames", "Point", "canonical_name", "is_module_path"]


class HookVariableNames:
    """The twenty named points. A hook may be attached to any of them, or to a module's path; see docs/hooks.md."""

    POST_TOK_EMBEDDINGS = "post-tok-embeddings"
    POST_POS_EMBEDDINGS = "post-pos-embeddings"
    PRE_ATTN = "pre-attn"
    QUERY_STATES = "query-states"
    KEY_STATES = "key-states"
    VALUE_STATES = "value-states"
    PRE_MASK_ATTN_WEIGHTS = "pre-mask-attn-weights"
    POST_MASK_ATTN_WEIGHTS = "post-mask-attn-weights"
    ATTN_PROBS = "attn-probs"
    ATTN_WEIGHTED_VALUES = "attn-weighted-values"
    ATTN_RESIDUAL = "attn-residual"
    POST_ATTN = "post-attn"
    PRE_MLP = "pre-mlp"
    POST_FC1 = "post-fc1"
    POST_ACT = "post-act"
    MLP_RESIDUAL = "mlp-residual"
    POST_MLP = "post-mlp"
    POST_FINAL_LAYER_NORM = "post-final-layer-norm"
    LOGITS = "logits"
    UNREDUCED_LOSS = "unreduced-loss"

    ALL_VARIABLE_NAMES = (
        POST_TOK_EMBEDDINGS, POST_POS_EMBEDDINGS, PRE_ATTN, QUERY_STATES, KEY_STATES, VALUE_STATES,
        PRE_MASK_ATTN_WEIGHTS, POST_MASK_ATTN_WEIGHTS, ATTN_PROBS, ATTN_WEIGHTED_VALUES, ATTN_RESIDUAL, POST_ATTN,
        PRE_MLP, POST_FC1, POST_ACT, MLP_RESIDUAL, POST_MLP, POST_FINAL_LAYER_NORM, LOGITS, UNREDUCED_LOSS,
    )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What a name stands for.

    Attributes
    ----------
    name : as in :class:`HookVariableNames`, or a module's path.
    shape : letters as above; empty for a module's path, where it depends on the module.
    by_layer : whether each layer has one.
    inside : what it is inside of attention: ``"states"`` (any attention implementation has them), ``"scores"`` (only
        the eager one has), or nothing.
    """

    name: str
    shape: str
    by_layer: bool = True
    inside: str = ""

    @property
    def token_dim(self) -> int:
        """The dimension whose rows are tokens of this pass; of keys and values, of all tokens."""
        return 2 if self.shape.startswith("b h") else 1

    @property
    def is_pairwise(self) -> bool:
        """Whether a token's row is as long as the text before it."""
        return self.inside == "scores"


_N = HookVariableNames
POINTS: Mapping[str, Point] = MappingProxyType(
    {
        point.name: point
        for point in (
            Point(_N.POST_TOK_EMBEDDINGS, "b n d", by_layer=False),
            Point(_N.POST_POS_EMBEDDINGS, "b n d", by_layer=False),
            Point(_N.PRE_ATTN, "b n d"),
            Point(_N.QUERY_STATES, "b h n c", inside="states"),
            Point(_N.KEY_STATES, "b h N c", inside="states"),
            Point(_N.VALUE_STATES, "b h N c", inside="states"),
            Point(_N.PRE_MASK_ATTN_WEIGHTS, "b h n N", inside="scores"),
            Point(_N.POST_MASK_ATTN_WEIGHTS, "b h n N", inside="scores"),
            Point(_N.ATTN_PROBS, "b h n N", inside="scores"),
            Point(_N.ATTN_WEIGHTED_VALUES, "b h n c", inside="states"),
            Point(_N.ATTN_RESIDUAL, "b n d"),
            Point(_N.POST_ATTN, "b n d"),
            Point(_N.PRE_MLP, "b n d"),
            Point(_N.POST_FC1, "b n f"),
            Point(_N.POST_ACT, "b n f"),
            Point(_N.MLP_RESIDUAL, "b n d"),
            Point(_N.POST_MLP, "b n d"),
            Point(_N.POST_FINAL_LAYER_NORM, "b n d", by_layer=False),
            Point(_N.LOGITS, "b n v", by_layer=False),
            Point(_N.UNREDUCED_LOSS, "b n-1", by_layer=False),
        )
    }
)
"""Every named point, in the order in which they are reached."""

# Points that TransformerLens has at the same place, with the same shape.
_LENS = {
    "hook_resid_mid": _N.POST_ATTN,
    "hook_resid_post": _N.POST_MLP,
    "hook_attn_out": _N.ATTN_RESIDUAL,
    "hook_mlp_out": _N.MLP_RESIDUAL,
    "attn.hook_attn_scores": _N.POST_MASK_ATTN_WEIGHTS,
    "attn.hook_pattern": _N.ATTN_PROBS,
    "mlp.hook_pre": _N.POST_FC1,
    "mlp.hook_post": _N.POST_ACT,
}
_LENS_NAME = re.compile(r"blocks\.(\d+)\.(.+)")


def canonical_name(name: object) -> tuple[str, int | None]:
    """Return the name of a point as the tables have it, and the layer that the name itself says, if it does.

    Parameters
    ----------
    name : one of the twenty names, a module's path, or TransformerLens' name of a point that coincides.

    Raises
    ------
    InputTypeError
        It is no name at all, or a point of TransformerLens that has no counterpart.
    """
    if not isinstance(name, str) or not name:
        raise InputTypeError(f"the name of a hook must be a str, not {name!r}", "see HookVariableNames")
    if name in POINTS:
        return name, None
    if name == "hook_embed":
        return _N.POST_TOK_EMBEDDINGS, None
    found = _LENS_NAME.fullmatch(name)
    if found is None:
        if is_module_path(name) and not name.startswith("hook_"):
            return name, None
    else:
        layer, rest = int(found[1]), found[2]
        if rest == "hook_resid_pre":  # what the layer before it leaves behind
            return (_N.POST_MLP, layer - 1) if layer else (_N.POST_POS_EMBEDDINGS, None)
        if rest in _LENS:
            return _LENS[rest], layer
        if "hook_" not in rest:
            return name, None
    raise InputTypeError(
        f"there is no point {name!r}",
        f"choose one of {', '.join(POINTS)}, or a module's path such as model.layers.3.mlp",
    )


def is_module_path(name: str) -> bool:
    """Return whether a name can be a module's path; whether the model has such a module is another question."""
    return name not in POINTS and all(part.isidentifier() or part.isdecimal() for part in name.split("."))
