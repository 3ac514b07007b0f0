"""Which policy of eviction saves most computing? Made-up workloads of shared prefixes, run through a store in memory.

Each request is a prompt: what of it is stored is loaded, the rest is computed, for so many seconds a token as its model
takes, and put. ``saved`` is the share of all seconds that were not spent computing. The quota is a share of what the
whole workload would take.

- ``chat``: conversations that grow by a turn, of which some twenty go on at a time, all on one of ten system prompts;
- ``few_shot``: 12 long headers, unequally popular, each followed by one of many questions, asked once or a few times;
- ``scan``: few_shot, and every third request is one of a long list that is never asked again;
- ``models``: few_shot for two models, one of which takes 20 times as long for the same bytes.

    python benchmarks/eviction.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from contextlib import suppress

from common import report

from promptdb.commits import SpanPayload
from promptdb.db import PromptDB
from promptdb.errors import QuotaExceededError
from promptdb.keys import Root, num_tokens, pack_tokens

CHUNK = 64
BYTES_PER_TOKEN = 256
POLICIES = ("cost", "lru", "fifo")
SMALL, LARGE = Root("aa" * 32, "bb" * 32), Root("cc" * 32, "bb" * 32)
SECONDS_PER_TOKEN = {SMALL: 0.001, LARGE: 0.02}

Request = tuple[Root, list[int]]


def popular(source: random.Random, count: int, exponent: float = 1.0) -> int:
    """Return a number below ``count``, the small ones more often (Zipf)."""
    return source.choices(range(count), [1 / (rank + 1) ** exponent for rank in range(count)])[0]


def text(seed: int, length: int) -> list[int]:
    """Return tokens that no other seed starts with."""
    source = random.Random(seed)
    return [seed, *(source.randrange(50_000) for _ in range(length - 1))]


def chat(source: random.Random, count: int) -> Iterator[Request]:
    """Conversations, each of which is gone on with for a while."""
    open_: list[list[int]] = []
    for number in range(count):
        if len(open_) < 20 or source.random() < 0.15:
            open_.append(text(popular(source, 10), 256))
            open_ = open_[-20:]
        talk = source.choice(open_)
        talk += text(1000 + number, source.randint(20, 120))
        yield SMALL, list(talk)


def few_shot(source: random.Random, count: int, root: Root = SMALL) -> Iterator[Request]:
    """Headers with questions."""
    for _ in range(count):
        header = popular(source, 12)
        question = 1000 * (header + 1) + popular(source, 400, 0.7)
        yield root, [*text(header, 512), *text(100_000 + question, 40)]


def scan(source: random.Random, count: int) -> Iterator[Request]:
    """Few-shot, with a list that is read once beside it."""
    for number, request in enumerate(few_shot(source, count)):
        yield (SMALL, text(10_000_000 + number, 400)) if number % 3 == 0 else request


def models(source: random.Random, count: int) -> Iterator[Request]:
    """Few-shot with a small and a large model."""
    for request in few_shot(source, count):
        yield (source.choice([SMALL, LARGE]), request[1])


WORKLOADS = {"chat": chat, "few_shot": few_shot, "scan": scan, "models": models}


def run(workload: str, policy: str, quota_bytes: int, count: int, seed: int) -> tuple[float, int]:
    """Return the share of seconds saved, and the bytes charged at the end."""
    now = [0.0]
    spent = total = 0.0
    with PromptDB.in_memory(chunk_tokens=CHUNK, quota_bytes=quota_bytes, policy=policy, clock=lambda: now[0]) as db:
        for root, tokens in WORKLOADS[workload](random.Random(seed), count):
            now[0] += 61.0  # later than what counts as the same use
            packed = pack_tokens(tokens)
            stored = db.lookup(packed, model=root.weights_id, tokenizer=root.tokenizer_id).num_tokens
            rate = SECONDS_PER_TOKEN[root]
            spent += rate * (len(tokens) - stored)
            total += rate * len(tokens)

            def encode(position: int, packed: bytes = packed, rate: float = rate) -> list[SpanPayload]:
                end, spans = num_tokens(packed), []
                while position < end:
                    stop = min(end, (position // CHUNK + 1) * CHUNK)
                    blob = bytes(BYTES_PER_TOKEN * (stop - position))
                    spans.append(SpanPayload(position, stop, (), {"x": blob}, rate * (stop - position), {}))
                    position = stop
                return spans

            with suppress(QuotaExceededError):  # longer than the quota: computed every time
                db.put(root, packed, stored, encode)
        return 1 - spent / total, db.usage()["charged_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5])
    arguments = parser.parse_args()
    rows = []
    for workload in WORKLOADS:
        whole = [run(workload, "lru", 0, arguments.requests, seed) for seed in range(arguments.seeds)]
        for share in arguments.shares:
            row: dict[str, object] = {"workload": workload, "quota": share}
            for policy in POLICIES:
                saved = [
                    run(workload, policy, int(share * size), arguments.requests, seed)[0]
                    for seed, (_, size) in enumerate(whole)
                ]
                row[policy] = round(sum(saved) / len(saved), 3)
            row["no_quota"] = round(sum(saved for saved, _ in whole) / len(whole), 3)
            rows.append(row)
    wins = {
        policy: sum(row[policy] >= max(row[each] for each in POLICIES) - 0.005 for row in rows) for policy in POLICIES
    }
    means = {policy: round(sum(float(str(row[policy])) for row in rows) / len(rows), 3) for policy in POLICIES}
    report("eviction", rows, requests=arguments.requests, seeds=arguments.seeds, best_within_0_005=wins, mean=means)


if __name__ == "__main__":
    main()
