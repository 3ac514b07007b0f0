"""What a store goes through in months, in minutes: kills, flipped bits, crowds. Used by tests (briefly) and by
``benchmarks/months.py`` (at length).

    python tests/endurance.py work PATH SEED FIRST     # what is killed: prints the number of each operation it finished
    python tests/endurance.py crowd PATH SEED COUNT    # one of many processes, checked against a plain model
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from promptdb import PromptDB
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.errors import CorruptDataError, PromptDBError, QuotaExceededError
from promptdb.format import META, STORE_KEY, TABLES
from promptdb.keys import Root, pack_tokens, prefix_digests, unpack_tokens
from promptdb.pages import check_pages

ROOT = Root("aa" * 32, "bb" * 32)
TIMEOUT_S = 120
QUOTA_BYTES = 300_000
CHUNK = 64
NOISE = random.Random(0).randbytes(1 << 17)


def put(db, tokens, *, largest=2000, logits=False, ttl_s=None):
    """Store a prompt whose blobs hold its tokens, and noise that only its tokens know, up to ``largest`` bytes."""
    packed = pack_tokens(tokens)

    def encode(position):
        spans = []
        while position < len(tokens):
            end = min(len(tokens), (position // CHUNK + 1) * CHUNK)
            part = packed[4 * position : 4 * end]
            noise = noise_of(packed[: 4 * end], largest)
            tensors = [
                (TensorSpec("tokens", "U32", (end - position,)), part),
                (TensorSpec("n", "U8", (len(noise),)), noise),
            ]
            spans.append(SpanPayload(position, end, (), {"x": build_blob(tensors)}, len(noise) / 1e6, {}))
            position = end
        return spans

    after = {len(tokens): build_blob([(TensorSpec("logits", "U8", (40,)), packed[-4:] * 10)])} if logits else None
    start = db.lookup(packed, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).num_tokens
    return db.put(ROOT, packed, start, encode, after, ttl_s=ttl_s)


def noise_of(packed, largest):
    """Return bytes that follow from a prefix."""
    seed = int.from_bytes(hashlib.sha256(packed).digest()[:8], "little")
    size = int(largest ** ((seed & 0xFFFF) / 0xFFFF))
    start = (seed >> 16) % (len(NOISE) - size + 1)
    return NOISE[start : start + size]


def check_content(db, tokens, *, largest=2000):
    """Return how many tokens of a prompt are stored; raise if any blob of them is not what was put."""
    packed = pack_tokens(tokens)
    with db.read() as snapshot:
        match = snapshot.match(ROOT, packed)
        for step in match.steps:
            record = snapshot.record(step.node)
            tensors = None if record is None else snapshot.blob(step.node, record, "x")
            if tensors is None:
                raise CorruptDataError("the index names what is not there")
            begin, end = 4 * record.start, 4 * (step.start + step.num_tokens)
            assert bytes(tensors["tokens"].data)[: end - begin] == packed[begin:end], "another prompt's tokens"
            if record.end * 4 <= len(packed) and record.span == packed[begin : 4 * record.end]:
                assert bytes(tensors["n"].data) == noise_of(packed[: 4 * record.end], largest), (
                    "another prompt's tensor"
                )
        if match.has_logits:
            (end,) = prefix_digests(ROOT.digest, packed, [match.num_tokens])
            logits = snapshot.logits(end)
            if logits is None:
                raise CorruptDataError("logits that were found are not there")
            assert bytes(logits.data)[:4] == packed[-4:], "another prompt's logits"
    return match.num_tokens


# Kills


def operation(db, seed, number):
    """Do operation ``number``: the same for the same state of the store, so that another store can follow."""
    source = random.Random(f"{seed}/{number}")
    nodes = sorted(node for node, _ in db.nodes()) if source.random() < 0.3 else []
    try:
        if not nodes:
            family = [source.randrange(6), source.randrange(4)]
            tokens = [
                *family,
                *(source.randrange(3) for _ in range(source.randint(0, 4))),
                *range(source.randint(1, 150)),
            ]
            ttl_s = source.choice([None, None, 200.0, 3000.0])
            put(db, tokens, largest=60_000, logits=source.random() < 0.3, ttl_s=ttl_s)
            return
        node = source.choice(nodes)
        what = source.random()
        if what < 0.3:
            db.remove(node, only=source.random() < 0.3)
        elif what < 0.6:
            db.pin_node(node, expires_s=source.choice([50.0, 500.0]), name=source.choice("abc"))
        elif what < 0.8:
            db.tag_node(source.choice("xyz"), node)
        elif what < 0.9:
            db.unpin(name=source.choice("abc"))
        else:
            db.set_ttl(source.choice([None, 900.0]))
    except (QuotaExceededError, PromptDBError) as error:
        if type(error).__name__ not in ("QuotaExceededError", "NodeNotFoundError"):
            raise


def options(number):
    """Return how the stores of this trial are opened: the clock stands still during an operation."""
    return {
        "chunk_tokens": CHUNK,
        "quota_bytes": QUOTA_BYTES,
        "policy": "cost",
        "clock": lambda: 1e9 + 10.0 * number[0],
    }


def work(path, seed, first):
    """Go on from operation ``first`` for ever."""
    number = [first]
    with PromptDB(path, map_bytes=1, **options(number)) as db:
        while True:
            db._accesses.take(1 << 30)  # whoever is killed forgets them, and who is not does not
            operation(db, seed, number[0])
            print(number[0], flush=True)
            number[0] += 1


def state(db):
    """Return a digest of all that a store holds."""
    digest = hashlib.sha256()
    with db.read() as snapshot:
        for table in TABLES:
            for key, value in snapshot.reader.scan(table):
                if (table, key) != (META, STORE_KEY):
                    digest.update(b"%d %d %b%b" % (len(key), len(value), key, value))
    return digest.hexdigest()


def kills(path, runs, seed=0, *, longest_s=0.15):
    """Kill a working process ``runs`` times; return what was seen. Raises if anything acknowledged is not there."""
    source = random.Random(seed)
    done, acknowledged, uncommitted, evicted, before_first = 0, 0, 0, 0, 0
    number = [0]
    with PromptDB.in_memory(**options(number)) as twin:  # does what was done, and is never killed
        for _ in range(runs):
            command = [sys.executable, __file__, "work", str(path), str(seed), str(done)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            if source.random() < 0.1:
                time.sleep(source.uniform(0.0, 0.4))  # perhaps before it has opened the store
                lines = []
            else:
                lines = [process.stdout.readline()]
                time.sleep(source.uniform(0.0, longest_s))
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.read().splitlines(keepends=True)
            assert process.wait(TIMEOUT_S) == -signal.SIGKILL
            lines = [line for line in lines if line.endswith("\n")]
            before_first += not lines
            last = int(lines[-1]) + 1 if lines else done
            acknowledged += last - done
            while done < last:
                number[0] = done
                twin._accesses.take(1 << 30)
                operation(twin, seed, done)
                done += 1
            number[0] = done
            if not (path / "data.mdb").exists():
                continue
            with PromptDB(path, **options(number)) as db:
                problems = db.verify()
                assert problems == [], problems
                found = state(db)
                if found != state(twin):
                    # It was killed between the commit of one more and the word of it.
                    twin._accesses.take(1 << 30)
                    operation(twin, seed, done)
                    done += 1
                    uncommitted += 1
                    assert found == state(twin), f"after operation {done - 1} the store is not what it should be"
                evicted = db.stat()["num_evicted"]
                assert db.stat()["charged_bytes"] <= QUOTA_BYTES
            assert check_pages(path) == []
    return {
        "kills": runs,
        "operations_acknowledged": acknowledged,
        "kills_between_commit_and_word": uncommitted,
        "kills_before_the_first_word": before_first,
        "spans_evicted": evicted,
    }


# Flipped bits


def fill(path, prompts=60, seed=0):
    """Make a store whose file has pages of every kind, some of them free; return its prompts."""
    source = random.Random(seed)
    made = []
    with PromptDB(path, chunk_tokens=CHUNK) as db:
        for number in range(prompts):
            tokens = [source.randrange(5), source.randrange(5), *range(source.randint(1, 150))]
            put(db, tokens, largest=30_000, logits=number % 3 == 0)
            made.append(tokens)
        for _ in range(prompts // 10):
            db.remove(source.choice(sorted(node for node, _ in db.nodes())))
    return made


OUTCOMES = {0: "all found or missed", 10: "some damaged", 11: "refused", 20: "wrong", 21: "error"}


def read_everything(path, prompts):
    """Look all prompts up, read what is found, and verify; return what came of it: a key of ``OUTCOMES``."""
    is_damaged = False
    try:
        with PromptDB(path) as db:
            for tokens in prompts:
                try:
                    check_content(db, tokens, largest=30_000)
                except PromptDBError:
                    is_damaged = True
            is_damaged = bool(db.verify()) or is_damaged
    except PromptDBError:
        return 11
    except AssertionError:
        traceback.print_exc()
        return 20
    except Exception:  # noqa: BLE001 - anything else that gets out is a mistake
        traceback.print_exc()
        return 21
    return 10 if is_damaged else 0


def in_child(work):
    """Return what became of a forked child that did some work: what it returned, or "crash"."""
    child = os.fork()
    if child == 0:
        code = 21
        try:
            code = work()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return "crash" if os.WIFSIGNALED(status) else OUTCOMES[os.waitstatus_to_exitcode(status)]


def flips(directory, runs, seed=0):
    """Flip one to eight bits of the file ``runs`` times, evenly over its kinds of pages; return what came of it."""
    source = random.Random(seed)
    sound = directory / "sound"
    prompts = fill(sound, seed=seed)
    data = (sound / "data.mdb").read_bytes()
    kinds = page_kinds(data)
    counts = {}
    for number in range(runs):
        kind = sorted(kinds)[number % len(kinds)]
        page = source.choice(kinds[kind])
        changed = bytearray(data)
        begin = source.randrange(4096)
        for _ in range(source.choice([1, 1, 8])):
            changed[page * 4096 + min(4095, begin + source.randrange(16))] ^= 1 << source.randrange(8)
        path = directory / "flipped"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        (path / "data.mdb").write_bytes(changed)
        is_seen = check_pages(path) != []
        outcome = in_child(lambda path=path: read_everything(path, prompts))
        assert outcome not in ("wrong", "error"), (kind, page)
        where = counts.setdefault(kind, {"flips": 0, "seen by check": 0, "crash": 0, "crash not seen by check": 0})
        where["flips"] += 1
        where["seen by check"] += is_seen
        where[outcome] = where.get(outcome, 0) + 1
        where["crash not seen by check"] += outcome == "crash" and not is_seen
    return counts


def page_kinds(data):
    """Return the numbers of a file's pages by kind, as LMDB's flags name them."""
    kinds = {}
    number, total = 0, len(data) // 4096
    names = {1: "branch", 2: "leaf", 4: "overflow", 8: "meta"}
    while number < total:
        flags = int.from_bytes(data[number * 4096 + 10 : number * 4096 + 12], "little") & 0xF
        kind = names.get(flags, "other")
        count = 1
        if kind == "overflow":
            count = max(1, min(int.from_bytes(data[number * 4096 + 12 : number * 4096 + 16], "little"), total - number))
        for page in range(number, number + count):
            kinds.setdefault(kind, []).append(page)
        number += count
    return kinds


# Crowds


def crowd(path, seed, count):
    """Do ``count`` operations of which those on prompts of its own are checked against a plain list of them."""
    source = random.Random(seed)
    mine: set[tuple[int, ...]] = set()  # every prefix that is stored, of prompts that start with this seed
    forked = 0
    with PromptDB(path, chunk_tokens=CHUNK) as db:
        for number in range(count):
            tokens = (
                1000 + seed,
                *(source.randrange(3) for _ in range(source.randint(1, 6))),
                *range(source.randint(1, 90)),
            )
            what = source.random()
            if what < 0.35:
                put(db, tokens)
                mine |= {tokens[:end] for end in range(1, len(tokens) + 1)}
            elif what < 0.6:
                expected = max((end for end in range(1, len(tokens) + 1) if tokens[:end] in mine), default=0)
                assert check_content(db, tokens) == expected
            elif what < 0.7:
                match = db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id)
                if match.steps:
                    start = match.steps[-1].start
                    node = match.steps[-1].node
                    with db.read() as snapshot:
                        record = snapshot.record(node)
                        prefix = tuple(unpack_tokens(db.prefix(snapshot, record)))
                    db.remove(node)
                    # All that goes on from any place inside the span went with it.
                    first = prefix[: record.start + 1]
                    assert start >= record.start
                    mine = {each for each in mine if each[: len(first)] != first}
            elif what < 0.95:
                shared = [source.randrange(3), *range(source.randint(1, 90))]
                if source.random() < 0.5:
                    put(db, shared)
                else:
                    assert check_content(db, shared) <= len(shared)
            else:
                db.stat()
            if number == count // 2:
                forked = fork_and_work(path, seed)
        for tokens in source.sample(sorted(mine), min(100, len(mine))):
            assert check_content(db, tokens) == len(tokens)
    print(json.dumps({"operations": count + forked, "prefixes": len(mine)}))


def fork_and_work(path, seed):
    """Work in a forked child, which has to open the store anew; return how many operations it did."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with PromptDB(path, chunk_tokens=CHUNK) as db:
                for number in range(20):
                    tokens = [2000 + seed, number, *range(50)]
                    put(db, tokens)
                    assert check_content(db, tokens) == len(tokens)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    return 20


def crowds(path, processes, count):
    """Let processes work on one store at once; return what they did. Raises if one was wrong."""
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "crowd", str(path), str(seed), str(count)], stdout=subprocess.PIPE, text=True
        )
        for seed in range(processes)
    ]
    answers = [process.communicate(timeout=TIMEOUT_S + count)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes
    with PromptDB(path) as db:
        assert db.verify() == []
        totals = db.stat()
    reports = [json.loads(answer) for answer in answers]
    return {
        "processes": processes,
        "operations": sum(report["operations"] for report in reports),
        "prefixes_checked": sum(min(100, report["prefixes"]) for report in reports),
        "spans_left": totals["num_nodes"],
    }


def main(what, path, *arguments):
    """Run as one of the processes."""
    if what == "work":
        work(Path(path), int(arguments[0]), int(arguments[1]))
    elif what == "crowd":
        crowd(Path(path), int(arguments[0]), int(arguments[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
