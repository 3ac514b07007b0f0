"""Generation that starts from a stored prefix and returns what ``model.generate`` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from promptdb.errors import InputTypeError
from promptdb.keys import unpack_tokens

if TYPE_CHECKING:
    from promptdb.engine import Engine

_OURS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "past_key_values", "position_ids")
# With these, generate brings a cache of its own, or reads the prompt in another way.
_UNTOUCHED = (
    *("assistant_model", "prompt_lookup_num_tokens", "cache_implementation", "custom_generate", "dola_layers"),
    *("assistant_early_exit", "use_mtp", "speculation_type"),
    # These return something for every token of the prompt, so that all of them have to go through the model.
    *("output_hidden_states", "output_attentions"),
)


def generate(engine: Engine, prompt: Any, hf_kwargs: dict[str, Any]) -> Any:
    """Run ``model.generate`` with all but the last token of the prompt in the cache; see :meth:`Engine.generate`."""
    for name in _OURS:
        if name in hf_kwargs:
            raise InputTypeError(f"generate() sets {name} itself", "pass the prompt as the first argument")
    model = engine.model
    asked = engine.tokenize(prompt)
    # As transformers does: what a configuration that is passed leaves open is as the model's own says.
    configs = (hf_kwargs.get("generation_config"), model.generation_config)

    def option(name: str, default: Any) -> Any:
        values = [hf_kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), default)

    representation = engine.get(asked)
    input_ids = torch.tensor([list(unpack_tokens(asked.packed))], dtype=torch.long, device=engine.device)
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        # generate tells a full prompt from a suffix by the length of the mask.
        "attention_mask": torch.ones_like(input_ids),
    }
    is_plain = not torch.is_autocast_enabled(engine.device.type)  # a stored prefix was computed without
    if is_plain and option("use_cache", True) and not any(option(name, None) for name in _UNTOUCHED):
        # One token is left to compute: generate needs its logits from a forward pass of its own.
        cache = representation.past_key_values(representation.num_tokens - 1)
        copies = max(option("num_beams", 1), option("num_return_sequences", 1))
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        inputs["past_key_values"] = cache
    with engine._extender.runner.alone():
        return model.generate(**inputs, **hf_kwargs)
