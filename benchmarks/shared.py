"""The shared store on a real Redis on loopback, against the bare client, copying memory and computing.

``python benchmarks/shared.py [--model] [--s3 ADDRESS] [--sync-mib N]``. Needs redis-server. Client and server share the
machine's cores, so that ratios say more than absolute times. With ``--model``, a GPT-2 of 124M parameters is computed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import redis
from common import median, report, table, timed

from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.db import PromptDB
from promptdb.far_open import open_far
from promptdb.format import Group
from promptdb.keys import Root, pack_tokens
from promptdb.pulling import Want
from promptdb.shared import connect
from promptdb.shared_options import SharedOptions
from promptdb.shared_sync import push
from promptdb.signing import write_key
from promptdb.trie import cut

MIB = 1 << 20
ROOT = Root("aa" * 32, "bb" * 32)
# 16 KiB a token, so that a span of 256 tokens has 4 MiB.
LAYOUT = (Group(tuple(range(8)), 8, 64, "F32"),)
SPAN_TOKENS = 256
ROUNDS, SPAN_ROUNDS = 15, 5


@contextmanager
def server(directory: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([*command, "--dir", str(directory)], stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port)
    for _ in range(200):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.02)
    try:
        yield f"redis://127.0.0.1:{port}", client
    finally:
        process.terminate()
        process.wait()


def encode(packed: bytes, chunk_tokens: int = SPAN_TOKENS):
    """Return an encoder of spans with numbers that differ from token to token, and are finite."""

    def spans(position: int) -> list[SpanPayload]:
        found = []
        for start, end in cut(position, len(packed) // 4, (), chunk_tokens):
            number = end - start
            seed = struct.pack("<f", 1.0 + start / 1e6) * 1024
            kv = [(TensorSpec("kv.0", "F32", LAYOUT[0].span_shape(number)), seed * (number * 4))]
            scores = struct.pack(f"<{number}f", *([-1.0] * number))
            lp = [(TensorSpec("token_logprobs", "F32", (number,)), scores)]
            blobs = {"kv": build_blob(kv), "lp": build_blob(lp)}
            found.append(SpanPayload(start, end, LAYOUT, blobs, 0.1, {}))
        return found

    return spans


def fill(db: PromptDB, num_tokens: int, first: int = 0) -> list[int]:
    tokens = [first, *range(1, num_tokens)]
    packed = pack_tokens(tokens)
    db.put(ROOT, packed, 0, encode(packed))
    return tokens


def clients(url: str, client: redis.Redis) -> list[dict]:
    """4 MiB through our client of the engine, against redis-py as it comes."""
    far = open_far(SharedOptions(url, timeout_s=30))
    rows = []
    for size in (MIB, 4 * MIB, 32 * MIB):
        value = os.urandom(size)
        numbers = itertools.count()

        def put(value: bytes = value, numbers: Iterator[int] = numbers) -> None:
            far.put([(f"v/{next(numbers)}", value)])

        def bare_put(value: bytes = value, numbers: Iterator[int] = numbers) -> None:
            client.set(f"bare{next(numbers)}", value)

        rows.append(_beside(f"client: put {size // MIB} MiB", put, "redis-py", bare_put))
        client.flushall()
        far.put([("v/x", value)])
        client.set("bare", value)
        get = partial(far.get, ["v/x"], [size])
        assert b"".join(get()[0]) == client.get("bare") == value
        rows.append(_beside(f"client: get {size // MIB} MiB", get, "redis-py", partial(client.get, "bare")))
        client.flushall()
    far.close()
    return rows


def _beside(what: str, ours: Callable[[], object], alternative: str, other: Callable[[], object]) -> dict:
    """Take turns: what others do to the machine, they do to both."""
    pairs = [(_seconds(ours), _seconds(other)) for _ in range(ROUNDS + 1)]
    return _row(what, alternative, pairs[1:])


def _seconds(work: Callable[[], object]) -> float:
    return timed(work, repeat=1, warmup=0)[0]


def _row(what: str, alternative: str, pairs: Sequence[tuple[float, float]]) -> dict:
    """Return medians over rounds of (our, the other's) seconds; the ratio is the median of the rounds'."""
    return {
        "what": what,
        "ms": 1000 * median([ours for ours, _ in pairs]),
        "alternative": alternative,
        "alternative_ms": 1000 * median([other for _, other in pairs]),
        "ratio": median([other / ours for ours, other in pairs]),
    }


def spans(url: str, client: redis.Redis, directory: Path, **options) -> list[dict]:
    """Whole spans of 4 MiB: read from one store, sent, fetched, checked, and committed to another."""
    name = "signed " if "sign_with" in options else "sealed " if "key" in options else ""
    count = 16
    value = os.urandom(4 * MIB + 2000)
    keys = [f"bare{number}" for number in range(count)]
    pushed, pulled, beside_put = [], [], []
    for round_number in range(SPAN_ROUNDS):
        # New keys every time, as a push has them: to overwrite values is faster for the server.
        bare_put = _seconds(lambda: [client.set(key, value) for key in keys])
        bare_get = _seconds(lambda: [client.get(key) for key in keys])
        client.flushall()
        one, two = directory / f"one{name}{round_number}", directory / f"two{name}{round_number}"
        with PromptDB(one, shared="none") as db:
            began = time.perf_counter()
            tokens = fill(db, count * SPAN_TOKENS)
            local_put = time.perf_counter() - began
        with PromptDB(one, shared=SharedOptions(url, timeout_s=30, **options)) as db:
            tier = connect(db)
            began = time.perf_counter()
            report_ = push(db, tier)
            pushed.append((time.perf_counter() - began, bare_put))
            assert report_.num_sent == count
        with PromptDB(two, shared=SharedOptions(url, timeout_s=30, **options)) as db:
            tier = connect(db)
            began = time.perf_counter()
            tier.pull(ROOT, [Want(pack_tokens(tokens))])
            took = time.perf_counter() - began
            pulled.append((took, bare_get))
            beside_put.append((took, bare_get + local_put))
            assert db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).num_tokens == len(tokens)
            assert tier.calls.counts.round_trips == 1
        shutil.rmtree(one)
        shutil.rmtree(two)
        client.flushall()
    return [
        _row(f"{name}push of {count} spans of 4 MiB", "redis-py set", pushed),
        _row(f"{name}pull of {count} spans of 4 MiB, committed", "redis-py get", pulled),
        _row(f"{name}the same pull", "get, and one local put", beside_put),
    ]


def lookups(url: str, directory: Path) -> list[dict]:
    """Round trips and time of finding the longest prefix."""
    rows = []
    with PromptDB(directory / "a", shared=url, chunk_tokens=8) as db:
        tier = connect(db)
        packed = pack_tokens(range(8000))
        db.put(ROOT, packed, 0, encode(packed[: 4 * 8000], 8))
        assert tier.flush(300)
    with PromptDB(directory / "b", shared=url, chunk_tokens=8) as db:
        tier = connect(db)
        for total in (64, 800, 8000):
            want = Want(pack_tokens([*range(total - 1), 1 << 20]))
            before = tier.calls.counts.round_trips
            find = tier.puller.find
            took = median(timed(lambda want=want, find=find: find(ROOT, [want], None), repeat=9, warmup=1))
            trips = (tier.calls.counts.round_trips - before) / 10
            assert trips <= 2
            rows.append({"what": f"lookup over {total // 8} boundaries", "ms": 1000 * took, "round_trips": trips})
    return rows


def sync(url: str, client: redis.Redis, directory: Path, num_mib: int) -> list[dict]:
    count = num_mib // 4
    with PromptDB(directory / "sync", shared="none") as db:
        for first in range(count // 64 or 1):
            fill(db, min(count, 64) * SPAN_TOKENS, first=first + 5)
    value = os.urandom(4 * MIB)
    began = time.perf_counter()
    for number in range(count):
        client.set(f"bare{number}", value)
    bare = time.perf_counter() - began
    client.flushall()
    with PromptDB(directory / "sync", shared=SharedOptions(url, timeout_s=30)) as db:
        tier = connect(db)
        began = time.perf_counter()
        push(db, tier)
        took = time.perf_counter() - began
        began = time.perf_counter()
        again = push(db, tier)
        resumed = time.perf_counter() - began
        assert again.num_sent == 0
    client.flushall()
    shutil.rmtree(directory / "sync")
    return [
        _row(f"push of {num_mib} MiB", "redis-py set", [(took, bare)]),
        _row("the same again, all there", "the first time", [(resumed, took)]),
    ]


def objects(url: str) -> list[dict]:
    """Finding the longest of n boundaries on an object store, half of them there: all at once, galloping, bisecting."""
    far = open_far(SharedOptions.of_url(url))
    rows = []
    for total in (16, 128, 1024):
        keys = [f"i/{total}/{number:04x}" for number in range(total)]
        far.put([(key, b"e" * 1100) for key in keys[: total // 2]])

        def gallop(keys: list[str] = keys) -> int:
            at, batch = 0, 16
            while at < len(keys):
                found = far.get(keys[at : at + batch])
                if None in found:
                    return at + found.index(None)
                at, batch = at + batch, 2 * batch
            return at

        def bisect(keys: list[str] = keys) -> int:
            low, high = 0, len(keys)
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if far.exists([keys[middle]])[0] else (low, middle)
            far.get(keys[:low])
            return low

        def all_at_once(keys: list[str] = keys) -> int:
            found = far.get(keys)
            return found.index(None)

        assert gallop() == bisect() == all_at_once() == total // 2
        for name, work in (("all at once", all_at_once), ("galloping", gallop), ("bisecting, then entries", bisect)):
            rows.append({"what": f"{name}, {total} boundaries", "ms": 1000 * median(timed(work, repeat=5))})
        far.delete(keys)
    far.close()
    return rows


def model(url: str, directory: Path) -> list[dict]:
    """A prompt of 1,000 tokens and GPT-2 with 124M parameters: fetched into an empty store, against computing it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from promptdb.demo_text import byte_tokenizer
    from promptdb.engine import Engine

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config()).eval()
    tokens = torch.randint(0, 256, (1000,)).tolist()
    with PromptDB(directory / "m1", shared=url) as db, Engine(db, gpt2, byte_tokenizer()) as engine:
        began = time.perf_counter()
        computed = engine.get(tokens)
        compute_s = computed.compute_s
        engine.flush()
        assert db.tier.flush(300)
    fetched, loaded = [], []
    for number in range(3):
        with PromptDB(directory / f"f{number}", shared=url) as db, Engine(db, gpt2, byte_tokenizer()) as engine:
            began = time.perf_counter()
            found = engine.get(tokens)
            fetched.append(time.perf_counter() - began)
            assert found.tokens_computed == 0
            assert torch.allclose(found.logits, computed.logits, atol=1e-5)
            began = time.perf_counter()
            found.past_key_values()
            loaded.append(time.perf_counter() - began)
    return [
        _row("GPT-2 124M, 1,000 tokens fetched, stored, logits", "computing", [(median(fetched), compute_s)]),
        _row("the same with keys and values in a cache", "computing", [(median(fetched) + median(loaded), compute_s)]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--s3", metavar="URL")
    parser.add_argument("--sync-mib", type=int, default=1024)
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="promptdb-shared-"))
    try:
        with server(directory) as (url, client):
            rows = clients(url, client) + spans(url, client, directory)
            write_key(str(directory / "key.pem"))
            rows += spans(url, client, directory, sign_with=str(directory / "key.pem"))
            rows += spans(url, client, directory, key=b"k" * 32)
            trips = lookups(url, directory)
            client.flushall()
            rows += sync(url, client, directory, arguments.sync_mib)
            if arguments.model:
                rows += model(url, directory)
        found = objects(arguments.s3) if arguments.s3 else []
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for rows_ in (trips, found):
        print(table(rows_), end="\n\n")
    report("shared", rows, lookups=trips, objects=found)


if __name__ == "__main__":
    main()
