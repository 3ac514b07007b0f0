"""Leases: of two machines that are to compute the same, the second waits, if that is sooner; and never for ever."""

from __future__ import annotations

import threading
import time

import pytest
from archive_tools import ROOT, lookup, put
from children import Child
from far_servers import free_port, needs_redis, proxy_to, redis_server
from shared_tools import PROMPT

from promptdb.keys import pack_tokens
from promptdb.pulling import Want

pytestmark = needs_redis()


@pytest.fixture
def server(tmp_path):
    with redis_server(tmp_path / "redis") as server:
        yield server


def wants_of(machine, *prompts):
    """Return what tells which of the prompts a machine has too little of."""

    def wants():
        found = [(tokens, lookup(machine.db, tokens)) for tokens in prompts]
        return [
            Want(pack_tokens(tokens), (), match.num_tokens, match.has_logits)
            for tokens, match in found
            if match.num_tokens < len(tokens)
        ]

    return wants


def settle(machine, *prompts, rate=None, token_bytes=None):
    """Return whether something came, and after how many seconds."""
    began = time.monotonic()
    found = machine.tier.leases.settle(ROOT, wants_of(machine, *prompts), rate, token_bytes)
    return found, time.monotonic() - began


def test_the_second_waits_and_gets_it(machine, server):
    one, two = machine("one", url=server.url), machine("two", url=server.url)
    assert settle(one, PROMPT) == (False, pytest.approx(0, abs=0.2))
    computed = threading.Timer(0.5, lambda: put(one.db, PROMPT))
    computed.start()
    found, waited_s = settle(two, PROMPT)
    computed.join()
    assert found
    assert 0.4 < waited_s < 3
    assert lookup(two.db, PROMPT).num_tokens == 50
    assert two.counts.waits == 1
    assert two.counts.waited_s == pytest.approx(waited_s, abs=0.1)


def test_nobody_waits_longer_than_computing_takes(machine, server):
    one, two = machine("one", url=server.url), machine("two", url=server.url)
    settle(one, PROMPT)
    found, waited_s = settle(two, PROMPT, rate=100.0)
    assert not found
    assert 0.4 < waited_s < 0.9
    # Of a prompt of which another computes a part, that part counts.
    found, waited_s = settle(two, [*PROMPT[:16], *range(500, 850)], rate=100.0)
    assert not found
    assert waited_s < 0.5


def test_a_lease_that_nobody_keeps_ends(machine, server):
    one, two, three = (machine(name, url=server.url, lease_s=0.6) for name in ("one", "two", "three"))
    settle(one, PROMPT)
    found, waited_s = settle(two, PROMPT)
    assert not found
    assert 0.3 < waited_s < 1.0
    # It is the second's now, and the third waits for that one.
    assert 0.3 < settle(three, PROMPT)[1] < 1.0


def test_nobody_waits_longer_than_its_own_leases_last(machine, server):
    """Whatever others, or whoever can write there, have said."""
    one, two = machine("one", url=server.url), machine("two", url=server.url, lease_s=0.5)
    settle(one, PROMPT)
    for name in server.cli("keys", "promptdb:c/*").split():
        server.cli("set", name, "somebody", "px", "86400000")
    assert 0.3 < settle(two, PROMPT)[1] < 1.2
    for name in server.cli("keys", "promptdb:c/*").split():
        server.cli("set", name, "somebody")  # without an end
    assert settle(two, PROMPT)[1] < 0.3


def test_who_gives_up_says_so(machine, server):
    one, two = machine("one", url=server.url), machine("two", url=server.url)
    settle(one, PROMPT)
    given_up = threading.Timer(0.3, one.tier.leases.give_up)
    given_up.start()
    found, waited_s = settle(two, PROMPT)
    given_up.join()
    assert not found
    assert 0.2 < waited_s < 1.5


def test_what_has_come_in_part_is_waited_for_in_the_rest(machine, server):
    one, two = machine("one", url=server.url), machine("two", url=server.url)
    settle(one, PROMPT)
    parts = [threading.Timer(0.3, lambda: put(one.db, PROMPT[:32])), threading.Timer(0.9, lambda: put(one.db, PROMPT))]
    for part in parts:
        part.start()
    assert settle(two, PROMPT)[0]
    for part in parts:
        part.join()
    assert lookup(two.db, PROMPT).num_tokens == 50


def test_prompts_that_only_begin_alike(machine, server):
    """A first token that all prompts share is nothing to wait for; whole chunks are."""
    one, two = machine("one", url=server.url, lease_s=1.5), machine("two", url=server.url)
    settle(one, PROMPT)
    assert settle(two, [PROMPT[0], *range(900, 1000)])[1] < 0.3
    assert settle(two, [*PROMPT[:15], *range(900, 1000)])[1] < 0.3
    assert settle(machine("three", url=server.url), [*PROMPT[:16], *range(800, 900)])[1] > 0.4


def test_a_batch_waits_once(machine, server):
    one, two = machine("one", url=server.url), machine("two", url=server.url)
    prompts = [[*PROMPT, number] for number in range(40)]
    settle(one, *prompts)
    computed = threading.Timer(0.4, lambda: [put(one.db, prompt) for prompt in prompts])
    computed.start()
    found, waited_s = settle(two, *prompts)
    computed.join()
    assert found
    assert waited_s < 5
    assert all(lookup(two.db, prompt).num_tokens == 51 for prompt in prompts)


def test_what_need_not_be_waited_for(machine, server, tmp_path):
    one = machine("one", url=server.url)
    settle(one, PROMPT)
    assert server.cli("keys", "promptdb:c/*").split()
    two = machine("two", url=server.url)
    two.tier.calls.round_trip_s = 1.0
    assert settle(two, PROMPT, rate=50.0)[1] < 0.2  # computed within a few round trips
    two.tier.calls.round_trip_s, two.tier.calls.bytes_per_s = 1e-4, 1000.0
    assert settle(two, PROMPT, rate=50.0, token_bytes=1000)[1] < 0.2  # computed sooner than fetched
    assert settle(machine("off", url=f"{server.url}?lease_s=0"), PROMPT)[1] < 0.2
    assert settle(machine("reader", url=f"{server.url}?readonly=1"), PROMPT)[1] < 0.2
    directory = f"file://{tmp_path}/far"
    settle(machine("three", url=directory), PROMPT)
    assert settle(machine("four", url=directory), PROMPT)[1] < 0.2
    assert two.counts.waits == 0


def test_failures_cost_what_they_cost_before(machine, server):
    """No server, a server that hangs, or one that takes no leases: nobody waits, and nothing is raised."""
    quick = {"timeout_s": 0.3, "connect_timeout_s": 0.3, "required": True}
    assert settle(machine("none", url=f"redis://127.0.0.1:{free_port()}", **quick), PROMPT)[1] < 1.5
    with proxy_to(server.port) as proxy:
        one, two = machine("one", url=server.url), machine("two", url=f"redis://127.0.0.1:{proxy.port}", **quick)
        settle(one, PROMPT)
        hung = threading.Timer(0.3, lambda: setattr(proxy, "is_silent", True))
        hung.start()
        assert settle(two, PROMPT)[1] < 3.5
        hung.join()
        assert settle(two, PROMPT)[1] < 0.1


CHILD = """
import sys, time
from promptdb import Engine, PromptDB
from promptdb.demo_models import random_model
from promptdb.demo_text import byte_tokenizer
from promptdb.runner import Runner

path, url, slow_s = sys.argv[1:]
extend = Runner.extend

def slowly(*args, **kwargs):
    print("computing", flush=True)
    time.sleep(float(slow_s))
    return extend(*args, **kwargs)

with PromptDB(path, chunk_tokens=64, shared=url) as db, Engine(db, random_model("llama"), byte_tokenizer()) as engine:
    Runner.extend = slowly
    print("ready", flush=True)
    for prompt in sys.stdin:
        engine._extender.cost.rates.clear()  # of a pass that slept, nobody knows how fast the next one is
        began = time.monotonic()
        found = engine.get(prompt)
        print("done", found.tokens_loaded, found.tokens_computed, time.monotonic() - began, flush=True)
        engine.flush()
        db.tier.flush(30)
"""
SLOW_S, LEASE_S = 1.5, 3


@pytest.fixture
def children(tmp_path, server):
    """Yield two processes with engines that take a while for every pass."""
    url = f"{server.url}?lease_s={LEASE_S}"
    with (
        Child(CHILD, tmp_path / "first", url, SLOW_S) as first,
        Child(CHILD, tmp_path / "second", url, SLOW_S) as second,
    ):
        for child in (first, second):
            assert child.stdout.readline() == "ready\n"
        yield first, second


def ask(child, prompt: str) -> None:
    child.stdin.write(prompt + "\n")
    child.stdin.flush()


def result(child) -> tuple[int, int, float]:
    """Return the tokens that a process loaded and computed, and how long that took."""
    lines = iter(child.stdout.readline, "")
    words = next(line for line in lines if line.startswith("done")).split()
    return int(words[1]), int(words[2]), float(words[3])


def test_two_processes(children):
    """Of two that are asked for the same at the same moment, one computes it, and the other fetches it.

    If the one that computes is killed, the other waits until the lease ends, and computes: no longer than that.
    """
    prompt = "Both machines were asked for this at the same moment. " * 12
    for child in children:
        ask(child, prompt)
    fetched, computed = sorted(map(result, children), key=lambda found: found[1])
    assert fetched[:2] == computed[1::-1]
    assert fetched[0] > 300
    assert fetched[1] == 0

    first, second = children
    other = "One of the machines is switched off while it computes this one. " * 12
    ask(first, other)
    while first.stdout.readline() != "computing\n":
        pass
    ask(second, other)
    time.sleep(0.5)
    first.kill()
    loaded, computed_tokens, seconds = result(second)
    assert computed_tokens > 300 > loaded
    assert SLOW_S + 1 < seconds < SLOW_S + LEASE_S + 3
