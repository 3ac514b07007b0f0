"""What a store comes to know of a model when an engine uses it: that it is exact, how it runs, and its description."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from promptdb.ambient import plain_torch
from promptdb.cost import CostModel
from promptdb.errors import UnsupportedModelError
from promptdb.probe import PROBE_VERSION, probe
from promptdb.version import __version__

if TYPE_CHECKING:
    from promptdb.db import PromptDB
    from promptdb.keys import Root
    from promptdb.runner import Runner
    from promptdb.tokens import Encoder


def register(db: PromptDB, root: Root, runner: Runner, encoder: Encoder, tokenizer_name: str) -> CostModel:
    """Probe a model unless these library versions did, tell its runner which ways are exact, and enter it.

    Returns
    -------
    CostModel
        With the rates that were measured before.

    Raises
    ------
    UnsupportedModelError
        Computing in steps does not give what one pass gives.
    """
    known = db.registry.model(root.weights_id) or {}
    # What was found exact by other versions is tried again.
    versions = f"promptdb {__version__}, transformers {version('transformers')}, torch {version('torch')}"
    versions += f", probe {PROBE_VERSION}, {runner.attention} attention on {runner.device.type}"
    if known.get("probed_with") != versions:
        with plain_torch(runner.device):
            found = probe(runner)
        if found.steps > found.tolerance:
            raise UnsupportedModelError(
                f"{runner.model_type} models are not supported: extending a prefix changes the logits by "
                f"{found.steps:.1e} of the largest",
                "its positions, mask or cache are not those of an ordinary decoder",
            )
        if math.isnan(found.steps):
            versions = ""  # nothing can be told of a model whose logits are not finite; nor will they be stored
        ways = found.exact_ways
    else:
        ways = frozenset(str(known.get("exact_ways", "")).split())
    runner.exact_ways = ways
    if not db.readonly:
        probed = {"probed_with": versions, "exact_ways": " ".join(sorted(ways))}
        db.registry.add_model(root.weights_id, {**_describe(runner), **probed})
        db.registry.add_tokenizer(root.tokenizer_id, {**encoder.registry_fields(), "name": tokenizer_name})
    return CostModel(known)


def _describe(runner: Runner) -> dict[str, Any]:
    model, config = runner.model, runner.model.config
    return {
        "model_type": config.model_type,
        "name": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "num_layers": int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_tokens": runner.max_tokens or 0,
    }
