"""What is stored of a prompt, as a document for programs and as text for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptdb.db import PromptDB
from promptdb.errors import CorruptDataError
from promptdb.keys import Root, unpack_tokens
from promptdb.snapshot import Match, Snapshot
from promptdb.tokens import Encoder, Prompt

from .export import export
from .output import count, duration, print_line, print_table, probability, size
from .predictions import predict
from .spans import REPAIR, stored_logits, stored_logprobs
from .texts import head, quoted, tail, token_texts

_BAR_WIDTH = 24
_STORED_WIDTH = 240
_MISSING_WIDTH = 120


@dataclass(frozen=True)
class Wanted:
    """What the answer should hold beside the extent of what is stored."""

    top: int = 5
    logprobs: bool = False
    out: Path | None = None


def answer(db: PromptDB, root: Root, encoder: Encoder, prompt: Prompt, wanted: Wanted) -> dict[str, Any]:
    """Look a prompt up and return all that was asked for. One snapshot; writes ``wanted.out`` only.

    Raises
    ------
    CorruptDataError
        What is stored of the prompt is damaged.
    """
    ids = unpack_tokens(prompt.packed)
    try:
        with db.read() as snapshot:
            match = snapshot.match(root, prompt.packed)
            stored = match.num_tokens
            found = {
                "weights_id": root.weights_id,
                "tokenizer_id": root.tokenizer_id,
                "namespace": root.namespace,
                "num_tokens": len(ids),
                "num_stored": stored,
                "has_logits": match.has_logits,
                "is_complete": match.is_complete,
                "stored_text": encoder.decode(ids[:stored]),
                "missing_text": encoder.decode(ids[stored:]),
                "next_tokens": _next_tokens(snapshot, match, encoder, wanted.top),
            }
            if wanted.logprobs:
                found["tokens"] = _tokens(snapshot, match, encoder)
            if wanted.out is not None:
                size_bytes = export(snapshot, match, wanted.out) if stored else None
                found["out"] = {"path": str(wanted.out), "size_bytes": size_bytes}
    except CorruptDataError as error:
        error.hint = error.hint or REPAIR
        raise
    return found


def _next_tokens(snapshot: Snapshot, match: Match, encoder: Encoder, top: int) -> list[dict[str, Any]]:
    logits = stored_logits(snapshot, match)
    if logits is None:
        return []
    predictions = predict(logits, top)
    before = unpack_tokens(match.packed)[: match.num_tokens]
    return [
        {
            "token_id": each.token_id,
            "text": token_texts(encoder, [each.token_id], before)[0],
            "probability": each.probability,
            "logprob_nats": each.logprob_nats,
        }
        for each in predictions
    ]


def _tokens(snapshot: Snapshot, match: Match, encoder: Encoder) -> list[dict[str, Any]]:
    ids = unpack_tokens(match.packed)[: match.num_tokens]
    rows = zip(ids, token_texts(encoder, ids), stored_logprobs(snapshot, match), strict=True)
    return [
        {
            "position": position,
            "token_id": token,
            "text": text,
            "logprob_nats": None if math.isnan(logprob) else logprob,
            "probability": None if math.isnan(logprob) else math.exp(logprob),
        }
        for position, (token, text, logprob) in enumerate(rows)
    ]


def print_answer(found: dict[str, Any], *, separated: bool) -> None:
    """Print the document for people, after an empty line if it is not the first."""
    if separated:
        print_line("")
    if found["source"]:
        print_line((found["source"], "bold"))
    print_extent(found["num_stored"], found["num_tokens"])
    if found["tokens_fetched"]:
        print_line(f"{count(found['tokens_fetched'], 'token')} fetched just now from the shared store")
    if found["tokens_computed"]:
        print_line(f"{count(found['tokens_computed'], 'token')} computed just now, in {duration(found['compute_s'])}")
    if found["num_stored"]:
        print_line(("stored   ", "bold"), tail(found["stored_text"], _STORED_WIDTH))
    if found["missing_text"]:
        print_line(("missing  ", "bold"), (head(found["missing_text"], _MISSING_WIDTH), "dim"))
    if "tokens" in found:
        _print_tokens(found["tokens"])
    if found["next_tokens"]:
        print_line("")
        rows = [
            (
                quoted(each["text"]),
                str(each["token_id"]),
                probability(each["probability"]),
                f"{each['logprob_nats']:.3f}",
            )
            for each in found["next_tokens"]
        ]
        print_table(("next token", ">ID", ">probability", ">log-probability"), rows)
    elif found["num_stored"] and not found["has_logits"]:
        print_line("The logits after the last stored token are not stored: no predictions there.")
    if "out" in found:
        out, tokens = found["out"], count(found["num_stored"], "token")
        if out["size_bytes"] is None:
            print_line(f"{out['path']} was not written: nothing of the prompt is stored")
        else:
            print_line(f"keys and values of {tokens} written to {out['path']}, {size(out['size_bytes'])}")
    if not found["is_complete"]:
        print_line("`promptdb get --compute` computes what is missing; `promptdb explain` tells why it is.")


def print_extent(stored: int, total: int) -> None:
    """Print how much of a prompt is stored, as numbers and a bar."""
    filled = _BAR_WIDTH * stored // total
    share = f"{100 * stored // total} %"
    print_line(
        ("█" * filled, "green"),
        ("░" * (_BAR_WIDTH - filled), "dim"),
        f" {stored:,} of {total:,} tokens stored, {share}",
    )


def _print_tokens(tokens: list[dict[str, Any]]) -> None:
    print_line("")
    rows = [
        (
            str(each["position"]),
            quoted(each["text"]),
            "" if each["logprob_nats"] is None else f"{each['logprob_nats']:.3f}",
            "" if each["probability"] is None else probability(each["probability"]),
        )
        for each in tokens
    ]
    print_table((">position", "token", ">log-probability", ">probability"), rows)
