"""From where on fetching keys and values beats computing them: a model of the link, held against a simulated one.

``python benchmarks/link.py [--no-figure]``. Needs redis-server, and matplotlib (extra ``plot``) for the figure.

The model. Fetching n tokens of b bytes each takes

    fetch(n) = base + 2 r + n b slow + min(n, 256) b fast

with a round trip of r seconds for the index entries and one for the values, on connections that are open. Of ``link``
and ``take``, in seconds a byte, ``slow`` is the slower one and ``fast`` the other: values of 256 tokens are received
while the one before is taken in, so that the faster of the two is waited for once. ``link`` is bound by its bandwidth,
and by a window of four values under way at once. ``base`` and ``take`` are what this machine needs to begin, and to
check, store and commit, fitted to fetches without a link. Computing takes n x 2 x parameters / (peak x utilisation)
seconds; attention is left out, which favours computing long prompts.

What is measured is the least of some repetitions: other programs on the machine only add to it.

Left out as well: TCP's slow start and a window smaller than what is under way, other users of the link, and loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import struct
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, report, table
from shared import server
from simulated_link import simulated

from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.db import PromptDB
from promptdb.format import Group
from promptdb.keys import Root, pack_tokens
from promptdb.pulling import Want
from promptdb.shared import connect
from promptdb.shared_options import SharedOptions
from promptdb.shared_sync import push
from promptdb.trie import cut

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "link.png"
ROOT = Root("aa" * 32, "bb" * 32)
# GPT-2 124M in float32: 12 layers, keys and values, 12 heads of 64.
LAYOUT = (Group(tuple(range(24)), 12, 64, "F32"),)
TOKEN_BYTES = 73_728
SPAN_TOKENS = 256
VALUES_UNDER_WAY = 4
GBIT = 1e9 / 8

# Dense peaks in Tflop/s: bf16 on the accelerators' tensor cores. Half of it is what good serving software gets out of
# a long prompt.
UTILISATION = 0.5


@dataclass(frozen=True)
class Machine:
    """A model on what computes it: bytes of a token's keys and values, and how many tokens a second are computed."""

    model: str
    hardware: str
    token_bytes: int
    tokens_per_s: float

    @property
    def needs_bytes_per_s(self) -> float:
        """What must arrive in a second for fetching to be as fast as computing."""
        return self.token_bytes * self.tokens_per_s


def computed(model: str, hardware: str, token_bytes: int, parameters: float, peak_tflops: float) -> Machine:
    return Machine(model, hardware, token_bytes, peak_tflops * 1e12 * UTILISATION / (2 * parameters))


def machines(cpu_tokens_per_s: float) -> list[Machine]:
    return [
        Machine("GPT-2 124M", "2 CPU cores, float32", TOKEN_BYTES, cpu_tokens_per_s),
        computed("GPT-2 124M", "one L4", TOKEN_BYTES // 2, 124e6, 121),
        computed("8B", "one L4", 131_072, 8e9, 121),
        computed("8B", "one H100", 131_072, 8e9, 989),
        computed("70B", "four A100", 327_680, 70e9, 4 * 312),
        computed("70B", "four H100", 327_680, 70e9, 4 * 989),
    ]


@dataclass(frozen=True)
class Taking:
    """What this machine needs to begin a fetch, in seconds, and how much it takes in a second."""

    base_s: float
    bytes_per_s: float

    def rates(self, token_bytes: int, trip_s: float, link_bytes_per_s: float) -> tuple[float, float]:
        """Return the seconds that a token takes on the slower of link and machine, and on the other."""
        window = VALUES_UNDER_WAY * SPAN_TOKENS
        link = max(token_bytes / link_bytes_per_s, trip_s / window)
        take = token_bytes / self.bytes_per_s
        return max(link, take), min(link, take)

    def fetch_s(self, num_tokens: int, token_bytes: int, trip_s: float, link_bytes_per_s: float) -> float:
        slow, fast = self.rates(token_bytes, trip_s, link_bytes_per_s)
        return self.base_s + 2 * trip_s + num_tokens * slow + min(num_tokens, SPAN_TOKENS) * fast


# So far, what is between is only the link: for machines that take what comes as fast as it comes.
AT_ONCE = Taking(0.0, float("inf"))


def crossover(machine: Machine, taking: Taking, trip_s: float, link_bytes_per_s: float) -> float | None:
    """Return from how many tokens on fetching is faster, at least 1, or None: never."""
    slow, fast = taking.rates(machine.token_bytes, trip_s, link_bytes_per_s)
    fixed = taking.base_s + 2 * trip_s
    for most, waited, each in ((SPAN_TOKENS, fixed, slow + fast), (float("inf"), fixed + SPAN_TOKENS * fast, slow)):
        gain = 1 / machine.tokens_per_s - each
        if gain > 0 and waited / gain <= most:
            return max(1.0, waited / gain)
    return None


# Measuring


def fill(db: PromptDB, tokens: list[int]) -> None:
    packed = pack_tokens(tokens)

    def spans(position: int) -> list[SpanPayload]:
        found = []
        for start, end in cut(position, len(tokens), (), SPAN_TOKENS):
            number = end - start
            values = struct.pack("<f", 1.0 + start / 1e6) * (number * TOKEN_BYTES // 4)
            blobs = {
                "kv": build_blob([(TensorSpec("kv.0", "F32", LAYOUT[0].span_shape(number)), values)]),
                "lp": build_blob(
                    [(TensorSpec("token_logprobs", "F32", (number,)), struct.pack(f"<{number}f", *[-1.0] * number))]
                ),
            }
            found.append(SpanPayload(start, end, LAYOUT, blobs, 0.1, {}))
        return found

    db.put(ROOT, packed, 0, spans)


def prompt(num_tokens: int) -> list[int]:
    return [num_tokens, *range(1, num_tokens)]


def fetch_s(url: str, directory: Path, num_tokens: int) -> float:
    """Return how long a store without it takes to fetch a prompt, on connections that are open."""
    tokens = prompt(num_tokens)
    path = Path(tempfile.mkdtemp(dir=directory))
    try:
        with PromptDB(path, shared=SharedOptions(url, timeout_s=30, connect_timeout_s=30)) as db:
            tier = connect(db)
            nothing = [(f"v/{number:02x}", 1 << 20) for number in range(4 * VALUES_UNDER_WAY)]
            assert list(tier.calls.fetch(nothing)) == [None] * len(nothing)
            tier.calls.lookup(["i/aa/00"])
            began = time.perf_counter()
            tier.pull(ROOT, [Want(pack_tokens(tokens))])
            took = time.perf_counter() - began
            assert db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).num_tokens == num_tokens
            return took
    finally:
        shutil.rmtree(path)


def fitted(points: list[tuple[int, float]]) -> Taking:
    """Return the line through (tokens, seconds), by least squares."""
    line = statistics.linear_regression([tokens * TOKEN_BYTES for tokens, _ in points], [took for _, took in points])
    return Taking(max(0.0, line.intercept), 1 / line.slope)


LENGTHS = (32, 256, 1000)
# (round trip in seconds, Gbit/s, tokens)
POINTS = (
    (0.001, 0.2, 256),
    (0.010, 0.1, 256),
    (0.050, 0.1, 256),
    (0.050, 1, 32),
    (0.010, 0.5, 1000),
    (0.001, 1, 1000),
    (0.050, 1, 1000),
)


def measure(directory: Path, repeat: int) -> tuple[Taking, list[dict]]:
    """Fit the model to this machine, and hold it against the simulated link."""
    with server(directory) as (url, client), ExitStack() as open_links:
        port = int(url.rpartition(":")[2])
        with PromptDB(directory / "source", shared=SharedOptions(url, timeout_s=30), chunk_tokens=SPAN_TOKENS) as db:
            for number in LENGTHS:
                fill(db, prompt(number))
            push(db, connect(db))
            assert connect(db).flush(60)
        assert client.dbsize()
        links = [open_links.enter_context(simulated(port, trip_s, gbit * GBIT)) for trip_s, gbit, _ in POINTS]
        bare: list[list[float]] = [[] for _ in LENGTHS]
        linked: list[list[float]] = [[] for _ in POINTS]
        for _ in range(repeat):  # in turn, so that what else the machine does is the same for all
            for samples, number in zip(bare, LENGTHS, strict=True):
                samples.append(fetch_s(url, directory, number))
            for samples, link, (*_, number) in zip(linked, links, POINTS, strict=True):
                samples.append(fetch_s(f"redis://127.0.0.1:{link}", directory, number))
    taking = fitted([(number, min(samples)) for number, samples in zip(LENGTHS, bare, strict=True)])
    rows = []
    for (trip_s, gbit, number), samples in zip(POINTS, linked, strict=True):
        said, took = taking.fetch_s(number, TOKEN_BYTES, trip_s, gbit * GBIT), min(samples)
        row = {"round trip ms": 1000 * trip_s, "Gbit/s": gbit, "tokens": number, "measured ms": 1000 * took}
        rows.append({**row, "model ms": 1000 * said, "model / measured": said / took})
    return taking, rows


def cpu_rate() -> float:
    """Return how many tokens of GPT-2 124M in float32 two cores compute in a second, as ``core.py`` has measured it."""
    rows = json.loads((RESULTS / "core.json").read_text())["rows"]
    return 1000 / min(row["alternative_ms"] / 1000 for row in rows if row["alternative"] == "recomputing")


# What comes out

LINKS_GBIT = (1, 10, 25, 100)
TRIPS_S = {"10 µs": 1e-5, "1 ms": 1e-3, "10 ms": 1e-2, "50 ms": 5e-2}


def crossovers(found: list[Machine], taking: Taking) -> list[dict]:
    rows = []
    for machine, (label, trip_s) in itertools.product(found, TRIPS_S.items()):
        row: dict = {"model": machine.model, "computed by": machine.hardware, "round trip": label}
        for gbit in LINKS_GBIT:
            row[f"{gbit} Gbit/s"] = _tokens(crossover(machine, AT_ONCE, trip_s, gbit * GBIT))
        row["10 Gbit/s, taken as here"] = _tokens(crossover(machine, taking, trip_s, 10 * GBIT))
        rows.append(row)
    return rows


def _tokens(found: float | None) -> int | str:
    return "never" if found is None else round(found)


def markdown(found: list[Machine]) -> str:
    """Return the table of docs/team.md: a row for each machine, a cell for each bandwidth with all round trips."""
    head = ["model", "computed by", "tokens/s", "needs", *(f"{gbit} Gbit/s" for gbit in LINKS_GBIT)]
    lines = [head, ["---"] * len(head)]
    for machine in found:
        needed = f"{_short(machine.needs_bytes_per_s / GBIT)} Gbit/s"
        cells = [machine.model, machine.hardware, f"{machine.tokens_per_s:,.0f}", needed]
        for gbit in LINKS_GBIT:
            lengths = [crossover(machine, AT_ONCE, trip_s, gbit * GBIT) for trip_s in TRIPS_S.values()]
            shown = ["–" if each is None else f"{each:,.0f}" for each in lengths]
            cells.append(" · ".join(shown) if any(lengths) else "never")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def needs(found: list[Machine]) -> list[dict]:
    return [
        {
            "model": machine.model,
            "computed by": machine.hardware,
            "bytes a token": machine.token_bytes,
            "tokens/s": round(machine.tokens_per_s),
            "needs Gbit/s": machine.needs_bytes_per_s / GBIT,
        }
        for machine in found
    ]


def draw(found: list[Machine], taking: Taking) -> None:
    """Write the figure: crossover lengths over the link's bandwidth, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    taken = taking.bytes_per_s / GBIT
    links = [10 ** (each / 200) for each in range(401)]
    colours = dict(zip(TRIPS_S, ("#9ecae1", "#4292c6", "#2171b5", "#08306b"), strict=True))
    models = list(dict.fromkeys(machine.model for machine in found))
    figure, panels = pyplot.subplots(1, len(models), figsize=(11, 4.1), sharey=True, layout="constrained")
    for panel, model in zip(panels, models, strict=True):
        for machine, style in zip([each for each in found if each.model == model], ("-", "--"), strict=True):
            for label, trip_s in TRIPS_S.items():
                points = [(gbit, crossover(machine, AT_ONCE, trip_s, gbit * GBIT)) for gbit in links]
                known = [(gbit, tokens) for gbit, tokens in points if tokens is not None]
                if known:
                    panel.plot(*zip(*known, strict=True), style, color=colours[label], linewidth=1.6)
            bound = machine.needs_bytes_per_s / GBIT
            if bound >= 1:
                panel.axvline(bound, color="#999999", linestyle=style, linewidth=0.8)
            panel.plot([], [], style, color="#333333", label=f"{machine.hardware}: needs {_short(bound)} Gbit/s")
        if taken >= 1:
            panel.axvline(taken, color="#d95f02", linestyle=":", linewidth=1.4)
        panel.set(xscale="log", yscale="log", xlim=(1, 100), ylim=(0.8, 1e6), title=model, xlabel="link, Gbit/s")
        panel.set_xticks([1, 2, 5, 10, 25, 100], ["1", "2", "5", "10", "25", "100"])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.legend(loc="upper right", fontsize=8, framealpha=0.95)
    panels[0].set_ylabel("tokens from which on fetching wins")
    ticks = [10**power for power in range(7)]
    panels[0].set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    handles = [pyplot.Line2D([], [], color=colour, label=f"round trip {label}") for label, colour in colours.items()]
    if taken >= 1:
        handles.append(pyplot.Line2D([], [], color="#d95f02", linestyle=":", label="all that 2 cores take in"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8.5, frameon=False)
    figure.savefig(FIGURE, dpi=110)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-figure", action="store_true")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="promptdb-link-"))
    try:
        taking, held = measure(directory, arguments.repeat)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    found = machines(cpu_rate())
    for each in (held, needs(found)):
        print(table(each), end="\n\n")
    here = {"base_ms": 1000 * taking.base_s, "take_bytes_per_s": taking.bytes_per_s, "utilisation": UTILISATION}
    rows = crossovers(found, taking)
    print(markdown(found), end="\n\n")
    report("link", rows, here=here, held_against=held, needs=needs(found))
    if not arguments.no_figure:
        draw(found, taking)


if __name__ == "__main__":
    main()
