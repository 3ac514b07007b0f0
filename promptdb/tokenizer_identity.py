"""Who cut this text: the digest of a tokenizer's content."""

from __future__ import annotations

import json
import struct
from typing import Any

from promptdb.code_identity import class_id
from promptdb.errors import IdentityError
from promptdb.hashing import FieldHasher

__all__ = ["tokenizer_id"]

_PROBES = (
    "Hello there. General Kenobi!",
    " leading and trailing ",
    "\n",
    "\n\n",
    "\t tabs,  two  spaces\r\n",
    "0123456789 3.14159 1,000,000",
    "naïve café ﬁn Ångström e\u0301",
    "日本語のテキスト 한국어 Ελληνικά العربية",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "<s></s><unk><pad><|endoftext|><|im_start|>user<bos><eos>[CLS][SEP][INST]",
    "def f(x):\n    return x**2  # code\n",
    "UPPER lower iNvErTeD \u00a0\u200b\u3000",
)


def tokenizer_id(tokenizer: Any) -> str:
    """Identify a tokenizer by its effective backend and by what it does to probe strings.

    Unchanged by earlier calls with truncation or padding, by ``pad_token``, and by saving and loading.

    Parameters
    ----------
    tokenizer : a fast or slow transformers tokenizer, or a ``tokenizers.Tokenizer``.

    Returns
    -------
    str
        64 hexadecimal digits. A transformers tokenizer and its bare backend have different IDs.

    Raises
    ------
    IdentityError
        It is neither, or its merges are random (BPE dropout).

    Notes
    -----
    Cost: serialises the vocabulary, some 0.1 s for 50,000 entries. Not thread safe for tokenizers in use elsewhere.
    """
    import tokenizers

    h = FieldHasher("promptdb/tokenizer/1")
    bare = isinstance(tokenizer, tokenizers.Tokenizer)
    backend: Any = tokenizer if bare else getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        spec = json.loads(backend.to_str())
        limited = spec.pop("truncation", None) is not None or spec.pop("padding", None) is not None
        spec.pop("truncation", None), spec.pop("padding", None)
        if spec.get("model", {}).get("dropout"):
            raise IdentityError("the tokenizer drops merges at random", "set its model's dropout to None")
        h.field("kind", "bare" if bare else "fast")
        h.field("backend", json.dumps(spec, sort_keys=True, ensure_ascii=False, separators=(",", ":")))
        if bare:
            h.field("encode_special_tokens", bool(backend.encode_special_tokens))
            if limited:  # calls set these; the probes must not see them
                copy = tokenizers.Tokenizer.from_str(json.dumps(spec))
                copy.encode_special_tokens = backend.encode_special_tokens
                backend = copy
    elif callable(getattr(tokenizer, "get_vocab", None)):
        h.field("kind", "slow").field("class", class_id(type(tokenizer)))
        for token, index in sorted(tokenizer.get_vocab().items()):
            h.field("token", str(token)).field("index", int(index))
        model = getattr(getattr(tokenizer, "sp_model", None), "serialized_model_proto", None)
        h.field("sentencepiece", model() if callable(model) else None)
    else:
        raise IdentityError(f"a {type(tokenizer).__name__} is no tokenizer", "pass one of transformers or tokenizers")
    if not bare:
        for name in ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "split_special_tokens"):
            value = getattr(tokenizer, name, None)
            h.field(name, value if value is None or isinstance(value, bool) else str(value))
    for probe in _PROBES:
        try:
            ids = backend.encode(probe).ids if bare else tokenizer(probe)["input_ids"]
        except Exception as error:  # noqa: BLE001 - backends raise bare Exception for text that they cannot encode
            h.field("probe", probe).field("error", type(error).__name__)
        else:
            h.field("probe", probe).field("ids", struct.pack(f"<{len(ids)}Q", *ids))
    return h.digest().hex()
