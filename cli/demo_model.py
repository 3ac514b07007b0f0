"""``promptdb demo-model``: a small language model for trying things out, with no download."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from promptdb.demo import NUM_STEPS, DemoReport, write_demo_model
from promptdb.demo_models import ARCHITECTURES, SIZES

__all__ = ["demo_model"]


@click.command("demo-model")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--arch", type=click.Choice(ARCHITECTURES), help="Random weights in this architecture, untrained.")
@click.option("--size", type=click.Choice(list(SIZES)), help="Random weights in the shape of this checkpoint.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights and training order.")
@click.option("--steps", type=click.IntRange(min=0), default=NUM_STEPS, show_default=True, help="Training steps.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo model in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def demo_model(
    directory: Path, arch: str | None, size: str | None, seed: int, steps: int, overwrite: bool, as_json: bool
) -> None:
    """Write a small language model and its tokenizer to DIR.

    It is trained for less than a minute on the docstrings of this machine's Python, so nothing is downloaded. With
    --arch or --size the weights are random instead.

    \b
    Example:
      promptdb demo-model ./demo
      promptdb put --model ./demo "Return a list of the"
    """
    with _progress_bar() as progress:
        report = write_demo_model(
            directory, arch=arch, size=size, seed=seed, num_steps=steps, overwrite=overwrite, progress=progress
        )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report) | {"directory": str(report.directory)}, indent=2))
    else:
        _print(report, directory)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int, float], None] | None]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading docstrings", total=None)

        def update(done: int, total: int, loss: float) -> None:
            bar.update(task, completed=done, total=total, description=f"training, {loss:.2f} nats/token")

        yield update


def _print(report: DemoReport, directory: Path) -> None:
    click.echo(
        f"Wrote {directory}: {report.architecture}, {report.num_parameters / 1e6:.1f} million parameters, "
        f"{report.vocab_size} tokens, {report.size_bytes / 1e6:.1f} MB, in {report.seconds:.0f} s"
    )
    if report.heldout_loss is None:
        click.echo("The weights are random: predictions mean nothing.")
    else:
        trained = f" Loss {report.loss:.2f} nats/token," if report.loss is not None else ""
        click.echo(
            f"Trained on {report.num_tokens_trained:,} tokens.{trained} {report.heldout_loss:.2f} on held-out text"
        )
    click.echo(f'Next: promptdb put --model {shlex.quote(str(directory))} "Return a list of the"')
