"""``promptdb stat`` and ``promptdb models``: the store as a whole, and what it knows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import click

from promptdb.db import PromptDB
from promptdb.format import TOTALS
from promptdb.life import DEFAULT_COMPRESSION
from promptdb.served import Served
from promptdb.shared_counts import read_shared_counts

from .options import store_options
from .output import age, count, duration, print_fields, print_json, print_line, size, span_of_time
from .shared_status import describe_totals, totals_fields


@click.command(short_help="Show totals of the store.")
@store_options
def stat(path: str | None, as_json: bool) -> None:
    """Show totals of the store.

    \b
    Examples:
      promptdb stat
      promptdb stat --db team.promptdb --json
    """
    with PromptDB(path, readonly=True) as db:
        found: dict[str, Any] = {
            "path": str(db.path),
            "format_version": db.format_version,
            "chunk_tokens": db.chunk_tokens,
            "created_unix_s": db.created_unix_s,
            "num_models": len(db.registry.models()),
            "num_tokenizers": len(db.registry.tokenizers()),
            **db.stat(),
            "policy": db.limits().policy,
            "compression": db.limits().compression,
            "is_encrypted": db.is_encrypted,
            **_served(db),
        }
        with db.read() as snapshot:
            found["shared"] = describe_totals(read_shared_counts(snapshot.reader))
    if as_json:
        print_json(found)
        return
    print_fields(
        {
            "store": found["path"],
            "format": f"version {found['format_version']}, spans of up to {count(found['chunk_tokens'], 'token')}",
            **({"encrypted": "yes"} if found["is_encrypted"] else {}),
            "created": f"{age(found['created_unix_s'])} ago",
            "models": f"{found['num_models']:,}, with {count(found['num_tokenizers'], 'tokenizer')}",
            "identities": f"{found['num_roots']:,}",
            "spans": f"{found['num_nodes']:,}, {count(found['num_tokens'], 'token')}",
            "logits": f"after {count(found['num_logits'], 'position')}",
            "stored": size(found["blob_bytes"]),
            **_describe_artifacts(found),
            **{name: value for name, value in describe_limits(found).items() if value and value != "none"},
            "file": f"{size(found['file_bytes'])}, of which {size(found['used_bytes'])} used",
            "disk": f"{size(found['free_bytes'])} free",
            **_describe_served(found),
            **{f"shared {name}": text for name, text in totals_fields(found["shared"]).items()},
        }
    )


def _describe_artifacts(found: dict[str, Any]) -> dict[str, str]:
    number = found["num_artifacts"]
    return {"artifacts": f"{number:,}, {size(found['artifact_bytes'])}"} if number else {}


def _served(db: PromptDB) -> dict[str, Any]:
    """Return what engines have served, all models together; ``saved_s`` is None where no model's speed is known."""
    total, saved_s = Served(), 0.0
    is_known = True
    for weights_id, served in db.served().items():
        total.add(served)
        rate = (db.registry.model(weights_id) or {}).get("compute_tokens_per_s")
        saved = served.saved_s(rate if isinstance(rate, (int, float)) else None)
        is_known, saved_s = is_known and saved is not None, saved_s + (saved or 0.0)
    tokens = total.tokens_loaded + total.tokens_computed
    share = total.tokens_loaded / tokens if tokens else None
    return {**asdict(total), "loaded_share": share, "saved_s": saved_s if is_known else None}


def _describe_served(found: dict[str, Any]) -> dict[str, str]:
    if not found["num_prompts"]:
        return {}
    saved = "" if found["saved_s"] is None else f", {duration(found['saved_s'])} saved"
    complete = found["num_complete"] / found["num_prompts"]
    lines = {
        "served": f"{count(found['num_prompts'], 'prompt')}, {complete:.0%} of them complete",
        "loaded": f"{count(found['tokens_loaded'], 'token')}, {found['loaded_share']:.0%} of all{saved}",
    }
    if found["num_quarantined"]:
        lines["damaged"] = f"{count(found['num_quarantined'], 'span')} taken out and computed again: `promptdb verify`"
    return lines


def describe_limits(found: dict[str, Any]) -> dict[str, str]:
    """Return what a person reads of limits and usage; empty where there is nothing to say."""
    quota, charged = found["quota_bytes"], found.get("charged_bytes")
    held = "" if charged is None else size(charged)
    if quota and charged is not None:
        held += f", {charged / quota:.0%} of the quota"
    gone = [
        f"{count(found[f'num_{what}'], 'span')} {what}" for what in ("evicted", "expired") if found.get(f"num_{what}")
    ]
    ttls = [f"{span_of_time(ttl_s)}{f' in {name}' if name else ''}" for name, ttl_s in found.get("ttl_s", {}).items()]
    return {
        "quota": f"{size(quota)}, {found['policy']} first" if quota else "none",
        "charged": held,
        "pinned": size(found["pinned_bytes"]) if found.get("pinned_bytes") else "",
        "removed": ", ".join(gone),
        "spans live": ", ".join(ttls),
        "compression": "" if found["compression"] == DEFAULT_COMPRESSION else found["compression"],
    }


@click.command(short_help="List known models and tokenizers.")
@store_options
def models(path: str | None, as_json: bool) -> None:
    """List known models and tokenizers.

    With what is stored of each model, and how fast it was computed and loaded when that was measured.

    \b
    Examples:
      promptdb models
      promptdb models --json
    """
    with PromptDB(path, readonly=True) as db:
        totals: dict[str, Counter[str]] = {}
        for root, amounts in db.roots():
            totals.setdefault(root.weights_id, Counter()).update(amounts)
        known = db.registry.checkpoints()
        found = [
            {
                "weights_id": weights_id,
                **fields,
                **{name: totals.get(weights_id, Counter())[name] for name in TOTALS},
                "checkpoints": sorted({each["path"] for each in known if each["weights_id"] == weights_id}),
            }
            for weights_id, fields in db.registry.models().items()
        ]
        tokenizers = [
            {
                "tokenizer_id": tokenizer_id,
                "name": fields.get("name", ""),
                "size_bytes": len(fields.get("json", "")),
                "runs_alone": bool(fields.get("json")),
            }
            for tokenizer_id, fields in db.registry.tokenizers().items()
        ]
    if as_json:
        print_json({"models": found, "tokenizers": tokenizers})
        return
    if not found:
        print_line("No model is known.")
        return
    for each in found:
        _print_model(each)
    for each in tokenizers:
        print_line((f"{each['name'] or '?'}", "bold"), ", a tokenizer")
        how = "" if each["runs_alone"] else ", runs with transformers only"
        print_fields({"  ID": each["tokenizer_id"], "  size": size(each["size_bytes"]) + how})


def _print_model(model: dict[str, Any]) -> None:
    longest = f"up to {count(model['max_tokens'], 'token')}" if model.get("max_tokens") else "any length"
    what = (model.get("model_type", "?"), _parameters(model.get("num_parameters", 0)), model.get("dtype", "?"), longest)
    print_line((str(model.get("name", "?")), "bold"), ", a model: ", ", ".join(map(str, what)))
    computes, loads = model.get("compute_tokens_per_s"), model.get("load_bytes_per_s")
    rates = [f"computes {computes:,.0f} tokens/s"] if computes else []
    rates += [f"loads {size(loads)}/s"] if loads else []
    stored = (count(model["num_nodes"], "span"), count(model["num_tokens"], "token"), size(model["blob_bytes"]))
    fields = {
        "  ID": model["weights_id"],
        "  files": ", ".join(model["checkpoints"]),
        "  stored": ", ".join(stored),
        "  measured": ", ".join(rates),
    }
    print_fields({name: value for name, value in fields.items() if value})


def _parameters(number: int) -> str:
    return f"{number / 1e9:.3g} billion parameters" if number >= 1e9 else f"{number / 1e6:.3g} million parameters"
