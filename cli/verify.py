"""``promptdb verify``: read the whole store, and say what does not hold."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from promptdb.db import PromptDB
from promptdb.lmdb_errors import DATA_FILE
from promptdb.opening import default_path
from promptdb.pages import check_pages_if_alone

from .failure import Failure
from .known import check_checkpoint
from .options import kv_codec_option, store_options
from .output import approximate, count, print_json, print_line, print_table

if TYPE_CHECKING:
    from promptdb.recompute import Recomputed

# Of a store that is badly damaged, the rest adds nothing.
_MOST_SHOWN = 50


@click.command(short_help="Check every record, blob and index entry of the store.")
@store_options
@click.option("--fix", is_flag=True, help="Remove what does not hold, and make the index and the totals again.")
@click.option(
    "--recompute",
    "sample",
    type=click.IntRange(min=1),
    metavar="SAMPLE",
    help="Compute so many random spans again with --model, and compare.",
)
@click.option("--model", "-m", help="Directory of the checkpoint for --recompute.")
@click.option("--dtype", default="auto", show_default=True, help="Of the model, as it was when the spans were stored.")
@click.option("--device", help="Where to compute.")
@click.option("--namespace", default="", help="Whose spans.")
@kv_codec_option
@click.option("--seed", type=int, help="Choose the same spans again.")
@click.pass_context
def verify(
    ctx: click.Context,
    path: str | None,
    as_json: bool,
    fix: bool,
    sample: int | None,
    model: str | None,
    dtype: str,
    device: str | None,
    namespace: str,
    kv_codec: str | None,
    seed: int | None,
) -> None:
    """Check every record, blob and index entry of the store.

    Reads everything, about as fast as the disk goes: records, blobs, indexes, and, if nobody has the store open, the
    pages of the file before it is opened. Exit code 0 if all holds, 1 if something did not; with --fix, what
    did not hold is then gone, and will be computed again when it is asked for.

    Checksums tell that nothing changed since it was stored. With --recompute, a sample of spans is computed again as
    well, and the largest difference is shown for each layer: exit code 1 if it is more than rounding, or, of spans that
    are stored with --kv-codec, more than that can make.

    \b
    Examples:
      promptdb verify
      promptdb verify --fix --json
      promptdb verify --recompute 20 --model demo
    """
    if (sample is None) != (model is None):
        raise click.UsageError("--recompute and --model go together.")
    if model is not None:
        check_checkpoint(model)
    directory = default_path() if path is None else Path(path)
    pages = check_pages_if_alone(directory) if (directory / DATA_FILE).is_file() else []
    if pages:
        # LMDB trusts its pages: to open the file could end this process.
        raise Failure(f"the pages of {directory} do not hold: {pages[0]}", "restore the store from a copy", exit_code=1)
    with PromptDB(path, readonly=not fix) as db:
        problems = db.verify(fix=fix)
        num_nodes = db.stat()["num_nodes"]
    again = None
    if sample is not None and model is not None:
        again = _recompute(path, model, dtype, device, namespace, kv_codec, sample, seed)
    is_exact = again is None or again.is_exact
    if as_json:
        found = [{"table": problem.table, "key": problem.key, "what": problem.what} for problem in problems]
        fields = {
            "is_sound": not problems,
            "pages_checked": pages is not None,
            "num_nodes": num_nodes,
            "is_fixed": fix,
            "problems": found,
        }
        if again is not None:
            fields["recomputed"] = {**asdict(again), "is_exact": is_exact}
        print_json(fields)
        ctx.exit(1 if problems or not is_exact else 0)
    if not problems:
        open_elsewhere = " The pages were not looked at: others have the store open." if pages is None else ""
        print_line(f"{count(num_nodes, 'span')}: everything holds.{open_elsewhere}")
    else:
        shown = problems[:_MOST_SHOWN]
        print_table(("table", "key", "problem"), [(each.table, each.key[:16], each.what) for each in shown])
        if len(problems) > len(shown):
            print_line(f"and {len(problems) - len(shown):,} more")
        what = "Removed; the store holds now." if fix else "`promptdb verify --fix` removes what does not hold."
        print_line(f"{count(len(problems), 'problem')}. {what}")
    if again is not None:
        _print_recomputed(again)
    ctx.exit(1 if problems or not is_exact else 0)


def _recompute(
    path: str | None,
    model: str,
    dtype: str,
    device: str | None,
    namespace: str,
    kv_codec: str | None,
    sample: int,
    seed: int | None,
) -> Recomputed:
    from promptdb.recompute import recompute

    from .compute import open_engine

    with PromptDB(path) as db, open_engine(db, model, dtype, device, namespace, kv_codec) as engine:
        return recompute(engine, sample, seed=seed)


def _print_recomputed(again: Recomputed) -> None:
    if not again.num_spans:
        print_line("Nothing of this model could be computed again: no span of it is stored with its prefix.")
        return
    rows = [
        (
            str(each.layer),
            f"{each.keys:.1e}",
            f"{each.largest_key:.3g}",
            f"{each.values:.1e}",
            f"{each.largest_value:.3g}",
        )
        for each in again.layers
    ]
    print_table((">layer", ">keys differ by", ">of", ">values differ by", ">of"), rows)
    skipped = f" ({count(again.num_skipped, 'span')} could not be read)" if again.num_skipped else ""
    print_line(
        f"{count(again.num_spans, 'span')}, {count(again.num_tokens, 'token')} computed again{skipped}; "
        f"log-probabilities differ by {again.logprobs:.1e} at most."
    )
    if again.is_exact:
        print_line(f"The {approximate(again.kv_codec)}." if again.kv_codec else "That is rounding.")
    else:
        print_line(
            f"That is more than rounding: span {again.worst_node[:16]} differs by {again.worst:.1e} of its layer's "
            f"size. `promptdb rm {again.worst_node[:16]}` removes it with what stands on it."
        )
