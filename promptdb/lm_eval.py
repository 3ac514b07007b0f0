"""The model ``promptdb`` of lm-evaluation-harness: requests that share a prefix have it computed once, ever.

``python -m promptdb.lm_eval`` is the command ``lm_eval`` with this model registered. Needs ``promptdb[eval]``.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from promptdb.db import PromptDB
from promptdb.engine import Engine
from promptdb.errors import InputTypeError, PromptDBError, PromptError

try:
    from lm_eval import utils  # type: ignore[import-untyped]
    from lm_eval.api.registry import model_registry  # type: ignore[import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
    from lm_eval.models.utils_hf import stop_sequences_criteria  # type: ignore[import-untyped]
    from tqdm import tqdm  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; install it with: pip install 'promptdb[eval]'", name=error.name) from error

if TYPE_CHECKING:
    import torch

__all__ = ["PromptDBLM", "main"]

_NAME = "promptdb"
# What lm_eval hands to a scoring method: the texts (None for a window of a longer text), context, continuation.
_TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
_Pair = tuple[list[int], list[int]]  # context and continuation

_log = logging.getLogger("lm_eval.promptdb")  # lm_eval shows what its own loggers say


class PromptDBLM(HFLM):  # type: ignore[misc]
    """A checkpoint whose log-probabilities come from a store as far as they are stored.

    Tokenisation, truncation, prefix tokens, chat templates and stop sequences are those of lm_eval's own model ``hf``,
    which this class extends; only what goes through the model is left to an :class:`promptdb.Engine`.

    Parameters
    ----------
    pretrained : directory of a checkpoint, or an ID on the Hugging Face hub.
    db : directory of the store; by default ``$PROMPTDB_PATH``, else the user's data directory. Created if missing.
    dtype : ``"auto"`` for the checkpoint's own, or the name of a torch dtype.
    device : by default CUDA if there is a device, else the CPU.
    namespace : as for :class:`promptdb.Engine`.
    max_length : most tokens that go through the model at once; longer requests lose their start, as with ``hf``.
    add_bos_token, prefix_token_id, chat_template_args, enable_thinking, think_end_token : as for ``hf``.
    batch_size, max_batch_size : accepted, as lm_eval passes them, and not used: the engine plans its own batches.

    Raises
    ------
    InputTypeError
        An unknown argument, or one of the wrong type.
    PromptDBError
        The store, the model or the tokenizer cannot be used; see :meth:`promptdb.Engine.from_pretrained`.

    Notes
    -----
    Everything is durable when a method returns. Not thread safe. The store is closed with the last reference.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] = "",
        db: str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        namespace: str = "",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise InputTypeError(
                f"the model {_NAME} has no argument {', '.join(map(repr, unknown))}", f"known are {', '.join(_KNOWN)}"
            )
        if not isinstance(pretrained, (str, os.PathLike)) or not str(pretrained):
            raise InputTypeError("no checkpoint is named", "pass pretrained=DIRECTORY or pretrained=HUB-ID")
        _check_type("namespace", namespace, str)
        _check_type("max_length", max_length, int)
        if max_length is not None and max_length < 1:
            raise InputTypeError(f"max_length is {max_length}", "give 1 or more")
        self._store, self._namespace = db, namespace
        self.tokens_loaded = 0
        """Tokens of all requests so far that were stored, or computed for an earlier request."""
        self.tokens_computed = 0
        """Tokens of all requests so far that went through the model; generated ones are not counted."""
        super().__init__(
            pretrained=os.fspath(pretrained),
            dtype=dtype,
            device=str(device or "auto"),  # what it does not know means: CUDA if there is a device, else the CPU
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            chat_template_args=chat_template_args,
            enable_thinking=enable_thinking,
            think_end_token=think_end_token,
            batch_size=1,  # of generation; scoring passes all requests on at once
        )

    def _create_model(self, pretrained: str, dtype: Any = "auto", **_options: Any) -> None:
        """Load the checkpoint; called by ``HFLM.__init__`` when it has the tokenizer."""
        with ExitStack() as stack:
            db = stack.enter_context(PromptDB(self._store))
            options = {"dtype": dtype, "device": self._device, "namespace": self._namespace}
            self.engine = stack.enter_context(Engine.from_pretrained(db, pretrained, **options))
            # lm_eval never closes a model.
            self._close = weakref.finalize(self, stack.pop_all().close)
        self._model = self.engine.model

    # Scoring. loglikelihood() itself is inherited: it turns texts into tokens.

    def _loglikelihood_tokens(
        self, requests: Sequence[_TokenRequest], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        num_cut = sum(len(pair[0]) < len(request[1]) for pair, request in zip(pairs, requests, strict=True))
        if num_cut:
            _log.warning("%d requests lose their start: max_length is %d tokens", num_cut, self.max_length)
        results: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as progress:
            for (texts, _, _), result in zip(requests, self._score(pairs), strict=True):
                results.append(result)
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, result)
                progress.update()
        self._finish()
        return results

    def _fitted(self, context: list[int], continuation: list[int]) -> _Pair:
        """Return a pair without what ``hf`` cuts off the start of a context that is too long."""
        if not context or not continuation:
            raise PromptError(
                f"a request has {len(context)} tokens of context and {len(continuation)} of continuation",
                "neither may be empty; look at what the task makes of its documents",
            )
        if len(continuation) > self.max_length:
            raise PromptError(
                f"a continuation has {len(continuation)} tokens, and at most {self.max_length} fit into the model",
                "pass a larger max_length if the model takes it",
            )
        surplus = len(context) + len(continuation) - (self.max_length + 1)  # the last token is only predicted
        return context[max(0, surplus) :], continuation

    def _score(self, pairs: Sequence[_Pair]) -> Iterator[tuple[float, bool]]:
        """Yield the log-probability of each continuation, and whether it is what greedy decoding gives."""
        asked = (self._without_last(*pair) if self._is_full(*pair) else pair for pair in pairs)
        for (context, continuation), score in zip(pairs, self.engine.score(asked), strict=True):
            self._count(score)
            logprob, is_greedy = score.logprob, score.is_greedy
            if is_greedy is None:
                is_greedy = self._is_greedy(context, continuation)
            if self._is_full(context, continuation):
                last = self.engine.get(context + continuation[:-1])
                self.tokens_computed += last.tokens_computed
                before = logprob if len(continuation) > 1 else 0.0
                logprob = before + float(last.logits.float().log_softmax(-1)[continuation[-1]])
                is_greedy = (is_greedy or len(continuation) == 1) and int(last.logits.argmax()) == continuation[-1]
            yield logprob, is_greedy

    def _is_full(self, context: list[int], continuation: list[int]) -> bool:
        """Whether a pair takes all of the model's positions for the prediction of its last token."""
        limit = self.engine.max_tokens
        return limit is not None and len(context) + len(continuation) == limit + 1

    def _without_last(self, context: list[int], continuation: list[int]) -> _Pair:
        if len(continuation) > 1:
            return context, continuation[:-1]
        return context[:-1], context[-1:]  # not asked for, but then its predecessors are stored

    def _is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        """Find out with a forward pass what an old store does not tell."""
        logits = self.engine.get(context + continuation[:-1], logits="all", store=False).logits
        return bool(logits[-len(continuation) :].argmax(dim=-1).tolist() == continuation)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in nats; texts longer than the model are cut into windows."""
        texts = [text for (text,) in (request.args for request in requests)]
        windows = [self._windows(text) for text in tqdm(texts, disable=disable_tqdm, desc="Tokenizing inputs")]
        every = [(None, *window) for own in windows for window in own]
        logprobs = iter([logprob for logprob, _ in self._loglikelihood_tokens(every, disable_tqdm=disable_tqdm)])
        results = []
        for text, own in zip(texts, windows, strict=True):
            results.append(sum(next(logprobs) for _ in own))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def _windows(self, text: str) -> list[_Pair]:
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [utils.make_disjoint_window(window) for window in windows]

    # Generating. generate_until() itself is inherited: it cuts contexts to length and looks for stop sequences.

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each context, up to a stop sequence; contexts are loaded and stored."""
        generated: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._finish()
        return generated

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """Generate after one context, ``[1, tokens]``; the options of ``HFLM``, which prepares them in the same way."""
        options.pop("attention_mask", None)  # nothing is padded
        options["temperature"] = options.get("temperature", 0.0)
        if options["temperature"] == 0.0:
            if options.get("do_sample") is None:
                options["do_sample"] = False
            if options["do_sample"] is False:
                options.pop("temperature")
        tokens = context[0].tolist()
        self._count(self.engine.get(tokens))
        generated: torch.Tensor = self.engine.generate(
            tokens,
            max_length=max_length,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, len(tokens), 1),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **options,
        )
        return generated

    # Accounts

    def _count(self, result: Any) -> None:
        self.tokens_loaded += result.tokens_loaded
        self.tokens_computed += result.tokens_computed

    def _finish(self) -> None:
        self.engine.flush()
        _log.info("%s: %d tokens loaded, %d computed so far", _NAME, self.tokens_loaded, self.tokens_computed)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes into its results: as for ``hf``, and what was loaded and computed."""
        info: dict[str, Any] = super().get_model_info()
        return info | {
            "promptdb_weights_id": self.engine.root.weights_id,
            "promptdb_tokens_loaded": self.tokens_loaded,
            "promptdb_tokens_computed": self.tokens_computed,
        }


_KNOWN = [name for name in PromptDBLM.__init__.__annotations__ if name not in ("unknown", "return")]

# By name: with ``python -m`` this module exists twice, and the registry takes a name once.
if _NAME not in model_registry:
    model_registry.register(_NAME, target="promptdb.lm_eval:PromptDBLM")


def _check_type(name: str, value: object, kind: type) -> None:
    if value is not None and type(value) is not kind:
        raise InputTypeError(
            f"{name} is {value!r}, of type {type(value).__name__}, not {kind.__name__}",
            'lm_eval reads a number as one: put quotes around it, as in namespace="1"' if kind is str else "",
        )


def main() -> None:
    """Run the command ``lm_eval`` with the model ``promptdb``; its other models and options are as ever."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped]

    try:
        cli_evaluate()
    except PromptDBError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
