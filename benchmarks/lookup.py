"""How long does the longest-prefix lookup of a 1,000-token prompt take, and does it grow with the store?

The prompts are stored in four spans (256 + 256 + 256 + 232 tokens), in stores of 1,000 to 1,000,000 nodes of three
kinds: whole documents, leaves of 1 to 256 tokens that all stand on one system prompt, and branches of 1 to 64 tokens
that leave documents in the middle of a span. Blobs are tiny: a lookup reads none.

``loop_us`` is the time of ``sum(range(5000))``, for judging how busy the machine was; ``best`` is the fastest lookup,
``quiet`` the median of the fastest of several passes, some seconds apart: others use the machine's cores, too.

    python benchmarks/lookup.py                      # all sizes; a few minutes and 4 GB of disk
    python benchmarks/lookup.py --nodes 1000 10000
"""

from __future__ import annotations

import argparse
import gc
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import median, percentile, report, timed

from promptdb.blobs import TensorSpec, build_blob
from promptdb.db import PromptDB
from promptdb.format import BLOBS, CHILDREN, NODES, ROOTS, BlobEntry, Group, NodeRecord, checksum, pack_root
from promptdb.keys import PrefixHasher, Root, child_key, node_id, unpack_tokens
from promptdb.rebuild import rebuild
from promptdb.tables import Writer

ROOT = Root("aa" * 32, "bb" * 32)
PROMPT_TOKENS, CHUNK = 1000, 256
SYSTEM_TOKENS = 512
BLOB = bytes(build_blob([(TensorSpec("token_logprobs", "F32", (1,)), bytes(4))]))
BATCH_NODES = 50_000
TARGET_US, TARGET_GROWTH = 100.0, 1.5
PASSES, PAUSE_S = 7, 2.0


def random_tokens(source: random.Random, count: int) -> bytes:
    """Return packed tokens of a vocabulary of 65,536."""
    packed, noise = bytearray(4 * count), source.randbytes(2 * count)
    packed[0::4], packed[1::4] = noise[0::2], noise[1::2]
    return bytes(packed)


def spans_of(packed: bytes, start: int, parent: bytes) -> Iterator[tuple[bytes, bytes, int, bytes]]:
    """Yield (parent, child hash, start, span) of a prompt's spans from ``start`` on, cut at multiples of ``CHUNK``."""
    hasher = PrefixHasher(ROOT.digest, packed)
    total = len(packed) // 4
    while start < total:
        end = min(total, (start // CHUNK + 1) * CHUNK)
        child_hash, span = hasher.at(start), packed[4 * start : 4 * end]
        yield parent, child_hash, start, span
        parent, start = node_id(child_hash, span), end


def content(source: random.Random, num_nodes: int, prompts: list[bytes]) -> Iterator[tuple[bytes, bytes, int, bytes]]:
    """Yield ``num_nodes`` spans, and append the whole documents among them to ``prompts``."""
    system = random_tokens(source, SYSTEM_TOKENS)
    system_spans = list(spans_of(system, 0, b""))
    yield from system_spans
    system_end = node_id(system_spans[-1][1], system_spans[-1][3])
    system_hash = PrefixHasher(ROOT.digest, system).at(SYSTEM_TOKENS)
    made = len(system_spans)
    used: set[bytes] = set()  # first tokens of leaves and branches: no two spans may carry the same token
    while made < num_nodes:
        document = random_tokens(source, PROMPT_TOKENS)
        spans = list(spans_of(document, 0, b""))
        if document[:4] == system[:4] or made + len(spans) > num_nodes or (document[:4]) in used:
            spans = []
        else:
            used.add(document[:4])
            prompts.append(document)
            yield from spans
            made += len(spans)
        for _ in range(3):  # branches
            if made < num_nodes and spans:
                _, _, start, span = source.choice(spans)
                at = start + source.randrange(1, len(span) // 4)
                branch = random_tokens(source, source.randint(1, 64))
                if (
                    branch[:4] != document[4 * at : 4 * at + 4]
                    and (key := document[:4] + at.to_bytes(4, "little")) not in used
                ):
                    used.add(key)
                    child_hash = PrefixHasher(ROOT.digest, document).at(at)
                    yield node_id(PrefixHasher(ROOT.digest, document).at(start), span), child_hash, at, branch
                    made += 1
        for _ in range(3):  # leaves
            leaf = source.randrange(1 << 24).to_bytes(4, "little") + random_tokens(source, source.randint(0, 255))
            if made < num_nodes and (key := b"leaf" + leaf[:4]) not in used:
                used.add(key)
                yield system_end, system_hash, SYSTEM_TOKENS, leaf
                made += 1


def build(db: PromptDB, num_nodes: int) -> list[bytes]:
    """Fill a store through its own writer, tens of thousands of nodes at once; return the packed prompts."""
    source = random.Random(num_nodes)
    prompts: list[bytes] = []
    totals = {"num_nodes": 0, "num_tokens": 0, "blob_bytes": 0}
    batch: dict[str, list[tuple[bytes, bytes]]] = {NODES: [], CHILDREN: [], BLOBS: []}
    layout = (Group((0, 1), 1, 1, "F32"),)

    def flush(writer: Writer) -> None:
        for table, items in batch.items():
            for key, value in sorted(items):
                writer.put(table, key, value)
        writer.put(ROOTS, ROOT.digest, pack_root(ROOT, totals))

    for parent, child_hash, start, span in content(source, num_nodes, prompts):
        node = node_id(child_hash, span)
        entry = BlobEntry(len(BLOB), checksum(node + b"lp", BLOB))
        record = NodeRecord(ROOT, parent, child_hash, start, span, layout, {"lp": entry}, 0.0, 0.0, {})
        batch[NODES].append((node, record.pack(node)))
        batch[CHILDREN].append((child_key(child_hash, span), node + span))
        batch[BLOBS].append((node + b"lp", BLOB))
        for name, amount in (("num_nodes", 1), ("num_tokens", len(span) // 4), ("blob_bytes", len(BLOB))):
            totals[name] += amount
        if len(batch[NODES]) == BATCH_NODES:
            db._index.transact(flush)
            for items in batch.values():
                items.clear()
    db._index.transact(flush)
    db._index.transact(rebuild)
    return prompts


def measure(db: PromptDB, prompts: list[bytes], *, as_list: bool, lookups: int) -> list[list[float]]:
    """Return seconds of each lookup of each pass; every answer is checked."""
    source = random.Random(7)
    queries = [source.choice(prompts) for _ in range(lookups)]
    asked = [list(unpack_tokens(query)) if as_list else query for query in queries]
    passes = []
    gc.collect()
    gc.disable()
    for number in range(1 + PASSES):
        samples = []
        for tokens in asked:
            begin = time.perf_counter()
            match = db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id)
            seconds = time.perf_counter() - begin
            assert match.num_tokens == PROMPT_TOKENS
            assert [step.num_tokens for step in match.steps] == [256, 256, 256, 232]
            samples.append(seconds)
        if number:  # the first warms up
            passes.append(samples)
            time.sleep(PAUSE_S)
    gc.enable()
    for query in queries[:200]:  # and to the token, where a prompt leaves what is stored
        at = source.randrange(1, PROMPT_TOKENS)
        other = query[: 4 * at] + (0xFFFFFFFF).to_bytes(4, "little") + query[4 * at + 4 :]
        assert db.lookup(other, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).num_tokens == at
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--lookups", type=int, default=3000)
    parser.add_argument("--directory", type=Path, help="where to make the stores; by default the temporary directory")
    parser.add_argument("--name", default="lookup", help="name of the result file")
    arguments = parser.parse_args()
    rows = []
    for num_nodes in arguments.nodes:
        directory = Path(tempfile.mkdtemp(dir=arguments.directory))
        try:
            begin = time.perf_counter()
            with PromptDB(directory / "store", map_bytes=max(1 << 26, num_nodes * 4096)) as db:
                prompts = build(db, num_nodes)
                build_s = time.perf_counter() - begin
                stat = db.stat()
                assert stat["num_nodes"] == num_nodes
                if num_nodes <= 10_000:
                    assert db.verify() == []
                found = {
                    "packed": measure(db, prompts, as_list=False, lookups=arguments.lookups),
                    "list": measure(db, prompts, as_list=True, lookups=arguments.lookups),
                }
        finally:
            shutil.rmtree(directory)
        rows.append(
            {
                "nodes": num_nodes,
                "store_mib": round(stat["used_bytes"] / 2**20),
                "build_s": round(build_s, 1),
                "loop_us": round(median(timed(lambda: sum(range(5000)), repeat=2000)) * 1e6),
            }
        )
        for kind, passes in found.items():
            samples = [seconds for each in passes for seconds in each]
            rows[-1][f"{kind}_best_us"] = round(min(samples) * 1e6, 1)
            rows[-1][f"{kind}_quiet_us"] = round(min(map(median, passes)) * 1e6, 1)
            rows[-1][f"{kind}_median_us"] = round(median(samples) * 1e6, 1)
            rows[-1][f"{kind}_p99_us"] = round(percentile(samples, 99) * 1e6, 1)
            rows[-1][f"{kind}_growth"] = round(rows[-1][f"{kind}_median_us"] / rows[0][f"{kind}_median_us"], 2)
    last = rows[-1]
    report(
        arguments.name,
        rows,
        prompt_tokens=PROMPT_TOKENS,
        spans_per_prompt=4,
        lookups=arguments.lookups,
        target=f"median < {TARGET_US:.0f} us at the largest store, growth < {TARGET_GROWTH}x",
        met=bool(last["packed_median_us"] < TARGET_US and last["packed_growth"] < TARGET_GROWTH),
    )


if __name__ == "__main__":
    main()
