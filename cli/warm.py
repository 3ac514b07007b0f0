"""``promptdb warm``: fill a team's store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import click

from promptdb.errors import PromptError
from promptdb.shared import Tier
from promptdb.tokens import Prompt

from .compute import open_engine
from .jobs import Feed, Interrupts, check_prompt, done_before, explaining, interruptible
from .known import check_checkpoint
from .options import device_option, model_options, shared_option, store_options
from .output import count, duration, print_json, print_line, size
from .progress import Meter
from .prompts import Asked, Line, as_asked, count_lines, nothing_in, stream_prompts
from .shared import opened

if TYPE_CHECKING:
    from promptdb.batch import Progress
    from promptdb.engine import Engine

# Between two looks at what still waits to be sent.
_TELL_EVERY_S = 2.0


@click.command(short_help="Compute prompts for everybody who uses the shared store.")
@click.option(
    "--file",
    "files",
    multiple=True,
    required=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help='Read prompts: a .jsonl file has objects with "text" or "pieces"; any other file is one text.',
)
@click.option("--skip-bad", is_flag=True, help="Report lines that cannot be used, and go on with the next.")
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Compute on the machines of a Ray cluster: HOST:PORT, ray://HOST:PORT, auto for this machine's, local for one "
    "that is started here.",
)
@click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --ray: how many at once; by default one for each GPU, or without any for each machine.",
)
@model_options
@device_option
@shared_option
@store_options
def warm(
    files: Sequence[str],
    skip_bad: bool,
    address: str | None,
    num_workers: int | None,
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    shared: str | None,
    path: str | None,
    as_json: bool,
) -> None:
    """Compute prompts for everybody who uses the shared store.

    What lies there is fetched, not computed; what is computed is sent, and the command ends when all of it has arrived.
    Can be interrupted and started again.

    With --ray, the prompts are cut into shares that have no token in common, and the machines of a Ray cluster compute
    them. Each needs promptdb, the model under the same path or name, and the environment (passwords, keys); --db is a
    path on every machine.

    \b
    Examples:
      promptdb warm --model demo --file prompts.jsonl --shared redis://cache.example:6379
      promptdb warm --model demo --file prompts.jsonl --shared redis://cache.example:6379 --ray head.example:6379
      promptdb warm --model demo --file prompts.jsonl --json
    """
    if address is not None:
        from .warm_ray import warm_on_ray

        worker = {"path": path, "dtype": dtype, "device": device, "namespace": namespace}
        warm_on_ray(files, model, shared, worker, address, num_workers, skip_bad=skip_bad, as_json=as_json)
        return
    if num_workers is not None:
        raise click.UsageError("--workers goes with --ray")
    meter = Meter(count_lines(files), is_shown=not as_json)

    def interrupted() -> str:
        return f"{meter.so_far('prompt')}. What was computed is stored; the same command goes on from there."

    with interruptible(interrupted) as interrupts:
        feed = Feed(stream_prompts((), files), interrupts, skip_bad=skip_bad, say=meter.say)
        if not feed.begin(as_asked):
            raise nothing_in(files)
        check_checkpoint(model)
        with opened(path, shared) as (db, tier):
            with open_engine(db, model, dtype, device, namespace) as engine:
                interrupts.hold()
                began = perf_counter()
                with meter, explaining(lambda: done_before(meter.num_done, "prompt", "stored")):
                    for loaded in _run(engine, feed, meter, interrupts):
                        meter.finished(loaded)
            _send(tier, meter, interrupts)
            seconds = perf_counter() - began
            found = {
                "num_prompts": meter.num_done,
                "num_skipped": feed.num_skipped,
                "tokens_computed": meter.tokens_computed,
                "tokens_loaded": meter.tokens_loaded,
                "elapsed_s": seconds,
                **tier.status(),
            }
        feed.finish(done_before(meter.num_done, "prompt", "stored"))
    if as_json:
        print_json(found)
        return
    counts = tier.calls.counts
    print_line(
        f"{count(meter.num_done, 'prompt')}: {count(meter.tokens_computed, 'token')} computed, "
        f"{count(counts.tokens_fetched, 'token')} fetched, {size(counts.bytes_sent)} sent, in {duration(seconds)}."
    )


def _run(engine: Engine, feed: Feed[Asked | Line], meter: Meter, interrupts: Interrupts) -> Iterator[int]:
    """Compute the prompts of a feed; yield how many tokens of each were loaded."""

    def parse(found: Asked | Line) -> tuple[Asked, Prompt]:
        asked = as_asked(found)
        try:
            return asked, check_prompt(engine, engine.tokenize(asked.pieces))
        except PromptError as error:
            asked.refuse(error)

    def prompts() -> Iterator[Prompt]:
        for asked, prompt in feed.items(parse):
            meter.handed(asked.number, prompt)
            yield prompt

    def on_progress(progress: Progress) -> None:
        meter.passed(progress)
        interrupts.check()

    for found in engine.run(prompts(), on_progress=on_progress):
        yield found.tokens_loaded


def _send(tier: Tier, meter: Meter, interrupts: Interrupts) -> None:
    """Wait until everything has arrived.

    Raises
    ------
    SharedError
        The far side fails. The rest stays in the queue.
    """
    while not tier.flush(_TELL_EVERY_S):
        interrupts.check()
        tier.raise_failure()
        meter.say(f"{tier.num_waiting():,} spans wait to be sent")
