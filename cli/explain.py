"""``promptdb explain``: why a prompt is stored or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from promptdb import explain as library
from promptdb.db import PromptDB
from promptdb.errors import PromptError
from promptdb.forecast import way_of
from promptdb.keys import Root, unpack_tokens

from .answer import print_extent
from .known import KnownModel, UnknownModelError, find_model
from .options import kv_codec_option, model_options, prompt_arguments, store_options
from .output import approximate, count, duration, print_json, print_line, print_table
from .prompts import Asked, read_prompts
from .texts import Decoders, quoted, tail, token_texts

WAYS = ("packed", "batched", "single")
_CONTEXT_WIDTH = 60
_FIELD_NAMES = {
    "weights_id": "weights",
    "tokenizer_id": "tokenizer",
    "intervention_id": "intervention",
    "kv_codec": "codec of keys and values",
}


@click.command(short_help="Tell why a prompt is stored or not.")
@prompt_arguments
@model_options
@kv_codec_option
@store_options
@click.pass_context
def explain(
    ctx: click.Context,
    texts: Sequence[str],
    files: Sequence[str],
    model: str,
    dtype: str,
    namespace: str,
    kv_codec: str | None,
    path: str | None,
    as_json: bool,
) -> None:
    """Tell why a prompt is stored or not.

    Shows where the prompt parts from the nearest stored one, under which other identity (weights, tokenizer) more of it
    is stored, what loading and computing would cost, and how the model runs many prompts at once: packed into one
    sequence, batched side by side, or single, whichever of these was found exact. Never loads a model.

    Exit code: as of `promptdb get`.

    \b
    Examples:
      promptdb explain --model demo "Return the number of lines"
      promptdb explain --model demo --file prompts.jsonl --json
    """
    prompts = read_prompts(texts, files)
    is_complete = True
    with PromptDB(path, readonly=True) as db:
        try:
            known: KnownModel | UnknownModelError = find_model(db, model, dtype, namespace, kv_codec)
        except UnknownModelError as error:
            known = error
        for number, asked in enumerate(prompts):
            try:
                found = _explain(db, known, asked, namespace)
            except PromptError as error:
                asked.refuse(error)
            is_complete = is_complete and found["is_complete"]
            if as_json:
                print_json(found)
            else:
                if number:
                    print_line("")
                _print(found)
    ctx.exit(0 if is_complete else 1)


def _explain(db: PromptDB, known: KnownModel | UnknownModelError, asked: Asked, namespace: str) -> dict[str, Any]:
    if isinstance(known, UnknownModelError):
        return _explain_unknown(db, known, asked, namespace)
    prompt = known.tokenize(asked.pieces)
    found = library.explain(db, known.root, prompt.packed)
    ids = unpack_tokens(prompt.packed)
    before = ids[: found.num_stored]

    def token(token_id: int) -> dict[str, Any]:
        return {"token_id": token_id, "text": token_texts(known.encoder, [token_id], before)[0]}

    return {
        "source": asked.place,
        "is_known_model": True,
        "weights_id": known.root.weights_id,
        "tokenizer_id": known.root.tokenizer_id,
        "namespace": namespace,
        "kv_codec": known.root.kv_codec,
        "num_tokens": found.num_tokens,
        "num_stored": found.num_stored,
        "has_logits": found.has_logits,
        "is_complete": found.is_complete,
        "reason": found.reason,
        "hint": "",
        "stored_text": known.encoder.decode(before),
        "expected_token": None if found.expected is None else token(found.expected),
        "stored_next_tokens": [token(each) for each in found.stored_next],
        "other_identities": [_identity(db, each.root, each.num_tokens, each.fields) for each in found.other_roots],
        "spans": [
            {
                "node": step.node.hex(),
                "start": step.start,
                "num_tokens": step.num_tokens,
                "span_tokens": step.span_tokens,
            }
            for step in found.steps
        ],
        "load_s": found.cost.load_s,
        "compute_s": found.cost.compute_s,
        **_ways(db, known.root),
    }


def _ways(db: PromptDB, root: Root) -> dict[str, Any]:
    """Return how several prompts may be computed at once with the model, and when that was found out."""
    fields = db.registry.model(root.weights_id) or {}
    if not fields.get("probed_with"):
        return {"exact_ways": None, "way": None, "probed_with": None}
    # One by one needs no probe: it is what the others are compared with.
    exact = [way for way in WAYS if way in (*str(fields.get("exact_ways", "")).split(), WAYS[-1])]
    return {"exact_ways": exact, "way": way_of(fields), "probed_with": fields["probed_with"]}


def _explain_unknown(db: PromptDB, error: UnknownModelError, asked: Asked, namespace: str) -> dict[str, Any]:
    """Say under which identities of the store the text is found, as this one's is not known."""
    decoders = Decoders(db)
    identities = []
    for root, _ in db.roots():
        encoder = decoders.encoder(root)
        if root.namespace != namespace or encoder is None:
            continue
        match = db.lookup(
            encoder.encode(asked.pieces).packed,
            model=root.weights_id,
            tokenizer=root.tokenizer_id,
            namespace=namespace,
            intervention=root.intervention_id,
            kv_codec=root.kv_codec,
        )
        if match.num_tokens:
            identities.append(_identity(db, root, match.num_tokens, ()))
    return {
        "source": asked.place,
        "is_known_model": False,
        "is_complete": False,
        "reason": error.message,
        "hint": error.hint,
        "other_identities": sorted(identities, key=lambda each: -int(each["num_stored"])),
    }


def _identity(db: PromptDB, root: Root, num_stored: int, differs_in: Sequence[str]) -> dict[str, Any]:
    return {
        "num_stored": num_stored,
        "model_name": str((db.registry.model(root.weights_id) or {}).get("name", "")),
        "weights_id": root.weights_id,
        "tokenizer_id": root.tokenizer_id,
        "intervention_id": root.intervention_id,
        "kv_codec": root.kv_codec,
        "differs_in": list(differs_in),
    }


def _print(found: dict[str, Any]) -> None:
    if found["source"]:
        print_line((found["source"], "bold"))
    if found["is_known_model"]:
        print_extent(found["num_stored"], found["num_tokens"])
    print_line(("why        ", "bold"), found["reason"])
    if found.get("kv_codec"):
        print_line(("stored     ", "bold"), approximate(found["kv_codec"]))
    if found["is_known_model"]:
        _print_parting(found)
    if found["other_identities"]:
        print_line("")
        columns = [">tokens stored", "as model", "weights", "tokenizer"] + ["differs in"] * found["is_known_model"]
        rows = [
            (
                f"{each['num_stored']:,}",
                each["model_name"] or "?",
                each["weights_id"][:12] + (f", {each['kv_codec']}" if each["kv_codec"] else ""),
                each["tokenizer_id"][:12],
                ", ".join(_FIELD_NAMES.get(name, name) for name in each["differs_in"]),
            )[: len(columns)]
            for each in found["other_identities"]
        ]
        print_table(columns, rows)
    if found["hint"]:
        print_line(found["hint"])


def _print_parting(found: dict[str, Any]) -> None:
    if found["expected_token"] is not None and found["num_stored"]:
        print_line(("up to      ", "bold"), tail(found["stored_text"], _CONTEXT_WIDTH))
    if found["expected_token"] is not None and (found["num_stored"] or found["stored_next_tokens"]):
        print_line(("prompt has ", "bold"), (_token(found["expected_token"]), "red"))
    if found["stored_next_tokens"]:
        print_line(("store has  ", "bold"), (", ".join(map(_token, found["stored_next_tokens"])), "green"))
    if found["num_stored"]:
        partly = [span for span in found["spans"] if span["num_tokens"] < span["span_tokens"]]
        used = f", the last one up to token {partly[-1]['num_tokens']} of {partly[-1]['span_tokens']}" if partly else ""
        print_line(("spans      ", "bold"), count(len(found["spans"]), "stored span") + used)
        print_line(("cost       ", "bold"), _cost(found["load_s"], found["compute_s"]))
    if found["exact_ways"]:
        print_line(("ways       ", "bold"), f"{found['way']}; exact are {', '.join(found['exact_ways'])}")
        print_line(("probed     ", "bold"), found["probed_with"])


def _cost(load_s: float | None, compute_s: float | None) -> str:
    if load_s is None and compute_s is None:
        return "not measured yet; prompts of 32 tokens and more are"
    load = "is not measured yet, loads of 1 MiB and more are" if load_s is None else f"takes {duration(load_s)}"
    compute = "not measured yet" if compute_s is None else duration(compute_s)
    return f"loading them {load}; computing them {compute} (measured rates)"


def _token(token: dict[str, Any]) -> str:
    return f"{quoted(token['text'])} ({token['token_id']})"
