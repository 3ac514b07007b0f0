"""Forward passes of a Hugging Face decoder, and which models may be run here at all."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from promptdb.cache import PromptCache
from promptdb.errors import (
    ModelError,
    ModelPlacementError,
    PromptTooLongError,
    TokenRangeError,
    TrainModeError,
    UnsupportedModelError,
)
from promptdb.head import fast_output
from promptdb.keys import num_tokens
from promptdb.masks import Masks
from promptdb.placement import device_of
from promptdb.scores import TokenScores, token_scores

# Positions computed in one pass. Longer suffixes are cut: logits of a pass take vocabulary x 4 bytes a position.
MAX_PASS_TOKENS = 2048

# Regimes in which the frequencies of rotary embeddings depend on the length of the text.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")

# A mask of our own for few tokens after many: transformers' own way to the same mask costs several milliseconds.
_MOST_MASK_ELEMENTS = 1 << 18


# Hooks that one engine attaches for a pass must not be in another one's pass.
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _one_at_a_time(model: Any) -> threading.RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


@dataclass(frozen=True)
class ForwardResult:
    """What one computation of positions ``[start, end)`` gave besides the keys and values in the cache.

    ``scores`` are those of the tokens from ``start + 1`` to ``end - 1``; ``logits`` holds next-token logits
    ``[vocabulary]`` at the positions asked for.
    """

    scores: TokenScores
    logits: dict[int, torch.Tensor]
    all_logits: torch.Tensor | None


class Runner:
    """A model that was found fit: extends caches exactly. Not thread safe, as models are not.

    Parameters
    ----------
    model : a ``PreTrainedModel`` with a language-model head, in eval mode, on one device.

    Attributes
    ----------
    attach : makes a context manager that each forward pass runs in, for hooks.
    is_causal : whether a token's results depend on those before it only. If not, a prompt is run in one pass or not at
        all.

    Raises
    ------
    UnsupportedModelError
        The architecture, by name and with the reason: encoder-decoders, several modalities, states that are more than
        keys and values, length-dependent rotary embeddings without a stated limit.
    TrainModeError, ModelPlacementError
        The model as it is now cannot be used.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        config = getattr(model, "config", None)
        if config is None or not callable(getattr(model, "forward", None)):
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a Hugging Face model", "load one with AutoModelForCausalLM"
            )
        self.model_type: str = config.model_type
        # An adapter's wrapper (peft) forwards keywords that only the inner model names.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._parameters = inspect.signature(inner.forward).parameters
        self._check_architecture(config, inner)
        self.masks = Masks(model, config)
        self.attach: Callable[[], AbstractContextManager[object]] = nullcontext
        self.is_causal = True
        self._exact_ways: tuple[str, frozenset[str]] = ("", frozenset())
        # Whoever adds or replaces modules changes the model's identity, and gets another runner.
        self._modules = list(model.modules())
        self.check_mode()
        self.check_placement()
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.max_tokens = _max_tokens(config)

    def _check_architecture(self, config: Any, inner: Any) -> None:
        def refuse(reason: str) -> UnsupportedModelError:
            return UnsupportedModelError(f"{self.model_type} models are not supported: {reason}")

        if getattr(config, "is_encoder_decoder", False):
            raise refuse("an encoder sees the whole text")
        if any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config")):
            raise refuse("only text models are")
        if inner.get_output_embeddings() is None:
            raise refuse(f"{type(inner).__name__} has no language-model head")
        if "past_key_values" not in self._parameters:
            raise refuse("the forward pass takes no past_key_values")
        if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
            raise refuse("its attention is not causal")
        for adapter in (getattr(self.model, "peft_config", None) or {}).values():
            if getattr(adapter, "is_prompt_learning", False):
                raise refuse(f"its {adapter.peft_type} adapter puts tokens of its own before the prompt")
        for layer in DynamicCache(config=config).layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise refuse(f"its cache has {type(layer).__name__}s, whose state is not that layer's keys and values")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the model for a pass, with the hooks that :attr:`attach` brings: no other runner's are there then."""
        with _one_at_a_time(self.model), self.attach():
            yield

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        embeddings = self.model.get_input_embeddings()
        return device_of(embeddings, embeddings.weight)

    @property
    def attention(self) -> str:
        """The model's attention implementation now.

        Waits for a pass of another thread, which may be under hooks that need another one meanwhile.
        """
        with _one_at_a_time(self.model):
            return str(getattr(self.model.config, "_attn_implementation", ""))

    @property
    def exact_ways(self) -> frozenset[str]:
        """Ways to run a tree of prompts that gave what one prompt at a time gives; see :mod:`promptdb.probe`.

        None is known to be exact any more when the attention implementation has been changed.
        """
        attention, ways = self._exact_ways
        return ways if attention == self.attention else frozenset()

    @exact_ways.setter
    def exact_ways(self, ways: frozenset[str]) -> None:
        self._exact_ways = (self.attention, ways)

    def check_mode(self) -> None:
        """Raise if the model, or a part of it, is in train mode. Costs microseconds."""
        if any(module.training for module in self._modules):
            name = next(name for name, module in self.model.named_modules() if module.training)
            raise TrainModeError(
                f"the model{' part ' + name if name else ''} is in train mode, where dropout makes results random",
                "call model.eval()",
            )

    def check_placement(self) -> None:
        """Raise if the model is spread over several devices, or not in memory. Costs microseconds per parameter."""
        parameters = [
            (module, parameter)
            for module in self._modules
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        devices = {parameter.device for _, parameter in parameters}
        if any(device.type == "meta" for device in devices):  # those that an offloading hook brings when they are used
            devices = {device_of(module, parameter) for module, parameter in parameters}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            raise ModelPlacementError(
                f"the model's weights are on {', '.join(sorted(map(str, devices))) or 'no device'}",
                "load it on one device: without device_map, or with device_map={'': 0}; a larger model: offload()",
            )

    def check_prompt(self, packed: bytes) -> None:
        """Raise if a prompt, as packed tokens, is too long, or has IDs outside the vocabulary."""
        count, largest = num_tokens(packed), int(np.frombuffer(packed, dtype="<u4").max())
        if self.max_tokens is not None and count > self.max_tokens:
            raise PromptTooLongError(
                f"the prompt has {count} tokens; this {self.model_type} computes {self.max_tokens} positions exactly",
                "shorten the prompt",
            )
        if largest >= self.vocabulary:
            raise TokenRangeError(
                f"token ID {largest} is outside the model's vocabulary of {self.vocabulary}",
                "is this the model's own tokenizer?",
            )

    def provenance(self) -> dict[str, str | int | float]:
        """Return how results are computed: versions, device, attention implementation."""
        device = self.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {
            "torch": torch.__version__,
            "transformers": _transformers_version(),
            "device": name,
            "attention": self.attention,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def extend(
        self,
        token_ids: torch.Tensor,
        cache: PromptCache,
        start: int,
        want_logits: set[int],
        *,
        keep_all: bool = False,
        pass_tokens: int = MAX_PASS_TOKENS,
    ) -> ForwardResult:
        """Compute positions ``[start, n)`` on top of a cache that holds ``[0, start)``, which grows in place.

        Parameters
        ----------
        token_ids : ``[n]`` int64 on the CPU.
        want_logits : positions i for which the logits after ``[0, i + 1)`` are returned.
        keep_all : return the logits of all computed positions, ``[n - start, vocabulary]``.
        pass_tokens : longest single pass.

        Returns
        -------
        ForwardResult
            On the CPU, but for logits, which stay where the model is.
        """
        end = token_ids.shape[0]
        if not self.is_causal:
            self._check_whole(start, end, end)
            pass_tokens = end
        device = self.device
        on_device = token_ids.to(device)
        scores = TokenScores.unknown(end - start - 1)
        kept: dict[int, torch.Tensor] = {}
        everything: list[torch.Tensor] = []
        for first in range(start, end, pass_tokens):
            last = min(first + pass_tokens, end)
            rows = self._forward(on_device, cache, first, last)
            targets = on_device[first + 1 : last + 1]  # one short in the last pass
            scores[first - start : last - start] = token_scores(rows, targets)
            kept.update({at: rows[at - first].clone() for at in want_logits if first <= at < last})
            if keep_all:
                everything.append(rows)
        return ForwardResult(scores, kept, torch.cat(everything) if keep_all else None)

    @torch.no_grad()
    def step(self, token_ids: torch.Tensor, cache: PromptCache, first: int, last: int) -> None:
        """Run one pass over positions ``[first, last)``, for what :attr:`attach` sees of it.

        Parameters
        ----------
        token_ids : ``[n]`` int64 on the CPU.
        """
        self._check_whole(first, last, token_ids.shape[0])
        self._forward(token_ids.to(self.device), cache, first, last)

    def _check_whole(self, first: int, last: int, total: int) -> None:
        if not self.is_causal and (first or last != total):
            raise ModelError(
                f"positions {first} to {last} of {total} by themselves: under hooks that are not causal, a prompt is "
                "computed as a whole",
                "this is a mistake of promptdb; please report it",
            )

    def _forward(self, token_ids: torch.Tensor, cache: PromptCache, first: int, last: int) -> torch.Tensor:
        positions = torch.arange(first, last)
        mask: torch.Tensor | dict[str, torch.Tensor]
        if self._is_small(first, last):
            everything = torch.arange(last)
            mask = self.masks.build(everything[None, :] <= positions[:, None], positions, everything, self.device)
        else:
            # The full-length mask and explicit positions: defaults differ between architectures and versions.
            mask = torch.ones((1, last), dtype=torch.long, device=self.device)
        return self._call(token_ids[None, first:last], mask, positions[None], cache)[0]

    def _is_small(self, first: int, last: int) -> bool:
        if not first or (last - first) * last > _MOST_MASK_ELEMENTS or "packed" not in self.exact_ways:
            return False
        most = self.masks.max_tokens()
        return self.masks.can_build and (most is None or last <= most)

    @torch.no_grad()
    def packed(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        past: torch.Tensor,
        cache: DynamicCache,
    ) -> torch.Tensor:
        """Compute m tokens of several prompts in one sequence; the cache of k tokens grows by them.

        Parameters
        ----------
        token_ids, positions : ``[m]`` int64, on any device: the tokens, and their places in their prompts.
        visible : ``[m, k + m]`` bool: which tokens of the cache, and which of these, each one sees.
        past : ``[k]`` int64: places of the cache's tokens in their prompts. On one device with ``positions`` and
            ``visible``.

        Returns
        -------
        torch.Tensor
            Logits ``[m, vocabulary]``, where the model is.
        """
        mask = self.masks.build(visible, positions, torch.cat((past, positions)), self.device)
        return self._call(token_ids[None].to(self.device), mask, positions[None], cache)[0]

    @torch.no_grad()
    def batched(self, token_ids: torch.Tensor, first: int, cache: DynamicCache) -> torch.Tensor:
        """Compute positions ``[first, first + m)`` of b prompts at once, on caches ``[b, ...]`` of ``first`` tokens.

        Parameters
        ----------
        token_ids : ``[b, m]`` int64 on the CPU.

        Returns
        -------
        torch.Tensor
            Logits ``[b, m, vocabulary]``, where the model is.
        """
        count, new = token_ids.shape
        mask = torch.ones((count, first + new), dtype=torch.long, device=self.device)
        positions = torch.arange(first, first + new).expand(count, new)
        return self._call(token_ids.to(self.device), mask, positions, cache)

    def _call(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | dict[str, torch.Tensor],
        positions: torch.Tensor,
        cache: DynamicCache,
    ) -> torch.Tensor:
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
            "return_dict": True,
        }
        if "position_ids" in self._parameters:
            inputs["position_ids"] = positions.to(self.device)
        before, new = cache.get_seq_length(), input_ids.shape[1]
        with self.alone(), fast_output(self.model, cache, input_ids.numel()):
            output = self.model(**inputs)
        if output.past_key_values is not cache:
            raise UnsupportedModelError(
                f"{self.model_type} models are not supported: they return a cache of their own",
            )
        if cache.get_seq_length() != before + new:
            raise UnsupportedModelError(
                f"{self.model_type} models are not supported: {new} tokens grew the cache by "
                f"{cache.get_seq_length() - before}",
            )
        logits: torch.Tensor = output.logits
        return logits


@cache
def _transformers_version() -> str:
    return version("transformers")  # reads a file


def _max_tokens(config: Any) -> int | None:
    """Return how many positions the model computes without leaving its regime, or None if there is no limit."""
    limits = [
        getattr(config, name)
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
        if isinstance(getattr(config, name, None), int)
    ]
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in nested:
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            if isinstance(original, int):
                limits.append(original)
    return min(limits) if limits else None
