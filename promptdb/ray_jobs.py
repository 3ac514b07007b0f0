"""A corpus computed by the machines of a Ray cluster. The only importer of ray.

Every worker is an actor: a model, a local store, and the shared one. The corpus is cut into shares that have no token
in common (:mod:`promptdb.shares`); who is free takes the next one.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from promptdb.errors import ClusterError, PromptDBError
from promptdb.shares import Shares, split
from promptdb.tokens import Prompt
from promptdb.worker import Done, Worker

LOCAL, AUTO = "local", "auto"
# A worker that dies is started again, and takes its share again, so many times.
_MOST_RESTARTS = 3
_TICK_S = 0.5
_CONNECT_S = 5.0
_CLOSE_S = 30.0


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to a Ray cluster; one that this program is connected to already is left as it is.

    Parameters
    ----------
    address : ``HOST:PORT`` of a cluster's head or ``ray://HOST:PORT`` of its server for clients, ``"auto"`` for the
        cluster that this machine belongs to, ``"local"`` to start one here that ends with the context.

    Raises
    ------
    ClusterError
        Ray is not installed, or the cluster does not answer.

    Notes
    -----
    A Ray that is started here reports no statistics to anybody, unless ``RAY_USAGE_STATS_ENABLED`` says otherwise.
    """
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    _check_address(address)
    own: dict[str, Any] = {}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own["include_dashboard"] = False
    try:
        with _own_signals():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"no Ray at {address}: {text}", "`ray status` tells more; versions must be the same"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep Ray from replacing the program's way of ending when it is told to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Ray itself takes minutes to say that nobody answers."""
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S):
            return
    except (ValueError, OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray at {address!r}: {error}", "give HOST:PORT of its head, ray://HOST:PORT, auto or local"
        ) from error


def compute(
    prompts: Sequence[Prompt],
    worker: Mapping[str, Any],
    *,
    num_workers: int | None = None,
    say: Callable[[str], object] = lambda text: None,
    check: Callable[[], object] = lambda: None,
) -> Iterator[Done]:
    """Compute a corpus on the cluster that this program is connected to; yield what became of each share.

    Parameters
    ----------
    prompts : the corpus, all of it in memory.
    worker : arguments of :class:`promptdb.worker.Worker`. Paths are those of the machines of the cluster.
    num_workers : how many workers; by default one for each GPU, or without any, or on ``device="cpu"``, one for each
        machine.
    say : is told what a person may want to know.
    check : called every now and then; what it raises ends the work. What was computed is stored, and what was sent is
        there for everybody.

    Yields
    ------
    Done
        ``num_prompts`` is 0 for beginnings that were computed for several shares.

    Raises
    ------
    ClusterError
        There are no machines, they do not agree on weights or tokenizer, or workers died again and again.
    PromptDBError
        Of a worker: see :meth:`promptdb.worker.Worker.compute`.

    Notes
    -----
    No token goes through a model twice, and none that is in the shared store and is sooner fetched. A worker that dies
    is replaced; its share is begun anew with what it had sent.
    """
    prompts = [replace(prompt, text=None) for prompt in prompts]
    if not prompts:
        return
    number, needs = _needs(_ray().nodes(), num_workers, worker.get("device"))
    shares = split(prompts, number)
    number = min(number, len(shares.shares))
    say(f"{number} worker{'s' * (number > 1)}, each with {'one GPU and ' * needs['num_gpus']}{needs['num_cpus']} CPU")
    with _pool(number, needs, worker, check) as pool:
        yield from _compute(pool, shares, prompts, number)


def _compute(pool: _Pool, shares: Shares, prompts: Sequence[Prompt], num_workers: int) -> Iterator[Done]:
    if shares.first:  # are fewer tokens, so that this ends
        for done in _compute(pool, split(shares.first, num_workers), shares.first, num_workers):
            yield replace(done, num_prompts=0)
    yield from pool.run(_jobs(shares, prompts))


def _jobs(shares: Shares, prompts: Sequence[Prompt]) -> Iterator[tuple[list[Prompt], list[Prompt]]]:
    for share, bases in zip(shares.shares, shares.bases, strict=True):
        yield [prompts[number] for number in share], [shares.first[number] for number in bases]


@contextmanager
def _pool(
    number: int, needs: Mapping[str, int], worker: Mapping[str, Any], check: Callable[[], object]
) -> Iterator[_Pool]:
    ray = _ray()
    kind = ray.remote(_Actor).options(
        **needs, max_restarts=_MOST_RESTARTS, max_task_retries=_MOST_RESTARTS, scheduling_strategy="SPREAD"
    )
    actors = [kind.remote(dict(worker)) for _ in range(number)]
    try:
        pool = _Pool(actors, check)
        yield pool
        pool.close()
    finally:
        for actor in actors:
            with suppress(Exception):
                ray.kill(actor)


class _Actor:
    """A worker on another machine. Made when it is first asked: what its making raises then arrives as it is."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self._worker: Worker | None = None

    def _made(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(**self._arguments)
        return self._worker

    def root(self) -> str:
        return self._made().root()

    def compute(self, prompts: Sequence[Prompt], bases: Sequence[Prompt]) -> Done:
        return self._made().compute(prompts, bases)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


@dataclass(frozen=True)
class _Started:
    actor: Any
    is_new: bool = False


class _Pool:
    """Workers, and what each is at. Those that have no place on the cluster yet do no harm: others take the shares."""

    def __init__(self, actors: Sequence[Any], check: Callable[[], object]) -> None:
        self._check = check
        self._busy = {actor.root.remote(): _Started(actor, is_new=True) for actor in actors}
        self._free: list[Any] = []
        self._root = ""

    def run(self, jobs: Iterator[tuple[list[Prompt], list[Prompt]]]) -> Iterator[Done]:
        """Hand out jobs, and yield what comes back, in the order in which it does."""
        waiting, num_running = deque(jobs), 0
        while waiting or num_running:
            while waiting and self._free:
                actor = self._free.pop()
                self._busy[actor.compute.remote(*waiting.popleft())] = _Started(actor)
                num_running += 1
            for started, found in self._ready():
                self._free.append(started.actor)
                if started.is_new:
                    self._agree(found)
                else:
                    num_running -= 1
                    yield found

    def close(self) -> None:
        """Let workers that have nothing to do close their stores, as far as they do it soon."""
        ray = _ray()
        closing = [actor.close.remote() for actor in self._free]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)

    def _ready(self) -> list[tuple[_Started, Any]]:
        ray = _ray()
        references, _ = ray.wait(list(self._busy), timeout=_TICK_S)
        self._check()
        found = []
        for reference in references:
            started = self._busy.pop(reference)
            try:
                found.append((started, ray.get(reference)))
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, PromptDBError):
                    raise error.cause from None
                raise
            except ray.exceptions.RayActorError as error:
                text = " ".join(str(error).split())[:300]
                raise ClusterError(f"workers died: {text}", "their logs lie in /tmp/ray/session_latest/logs") from error
        return found

    def _agree(self, root: str) -> None:
        if self._root and root != self._root:
            raise ClusterError(
                "the workers' models have different weights, or another tokenizer",
                "put the same files on every machine",
            )
        self._root = root


def _needs(
    nodes: Sequence[Mapping[str, Any]], num_workers: int | None, device: str | None
) -> tuple[int, dict[str, int]]:
    """Return how many workers there are to be, and what each takes of a machine."""
    machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not machines:
        raise ClusterError("the cluster has no machine with a CPU to give", "`ray status` lists them")
    gpus = [int(machine.get("GPU", 0)) for machine in machines] if device is None or device.startswith("cuda") else []
    if sum(gpus):
        own = [(int(machine["CPU"]), number) for machine, number in zip(machines, gpus, strict=True) if number]
        return num_workers or sum(gpus), {"num_gpus": 1, "num_cpus": max(1, min(cpus // each for cpus, each in own))}
    number = num_workers or len(machines)
    on_each = -(-number // len(machines))
    return number, {"num_gpus": 0, "num_cpus": max(1, min(int(machine["CPU"]) for machine in machines) // on_each)}


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ClusterError("Ray is not installed", "pip install 'promptdb[ray]'") from error
    return ray
