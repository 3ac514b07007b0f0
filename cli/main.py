"""The ``promptdb`` command: the group of all commands, and what exit codes mean.

0: found, or done. 1: not found, or only partly. 2: wrong usage, or an error. 130: interrupted. 141: the reader of our
output went away.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from keyword import iskeyword
from typing import TextIO

import click

from promptdb.errors import NodeNotFoundError, PromptDBError
from promptdb.version import __version__

from .failure import Failure

INTERRUPTED = 130
BROKEN_PIPE = 141

# Command -> its module and one line of help. The lines stand here so that `promptdb --help` need not import the
# commands; a test compares them with the commands' own.
COMMANDS = {
    "put": ("put", "Compute prompts and store their representations."),
    "score": ("score", "Compute how likely continuations are."),
    "record": ("record", "Compute activations of prompts and store them."),
    "activations": ("activations", "List recorded activations, draw them, or write them to files."),
    "artifacts": ("artifacts", "List, show, draw and remove named results."),
    "get": ("get", "Look up the longest stored prefix of a prompt."),
    "explain": ("explain", "Tell why a prompt is stored or not."),
    "tree": ("tree", "Draw the stored spans as a tree."),
    "ls": ("nodes", "List stored spans."),
    "show": ("nodes", "Show all that is known of a stored span, and check it."),
    "rm": ("remove", "Remove spans and all that stands on them."),
    "stat": ("store", "Show totals of the store."),
    "models": ("store", "List known models and tokenizers."),
    "limits": ("lifecycle", "Show or set the quota, what is evicted first, how long spans live, and compression."),
    "gc": ("lifecycle", "Remove what has expired or cannot be found any more, and evict down to a size."),
    "compact": ("lifecycle", "Give unused space of the file back to the disk."),
    "pin": ("lifecycle", "Protect prompts from eviction and expiry for a time."),
    "unpin": ("lifecycle", "Take pins off."),
    "pins": ("lifecycle", "List pins and tags."),
    "doctor": ("health", "Look for what may go wrong with the store."),
    "metrics": ("health", "Print the store's numbers for Prometheus."),
    "verify": ("verify", "Check every record, blob and index entry of the store."),
    "export": ("archive", "Write spans to a file that another store can import."),
    "import": ("archive", "Store what an exported file holds."),
    "push": ("shared", "Send spans to the shared store."),
    "pull": ("shared", "Fetch everything that the shared store has."),
    "sync": ("shared", "Send and fetch: afterwards both stores have everything."),
    "shared": ("shared", "Show and set up the store that is shared with other machines."),
    "warm": ("warm", "Compute prompts for everybody who uses the shared store."),
    "backup": ("copies", "Copy the whole store while others use it."),
    "rotate-key": ("rotate", "Let another key open an encrypted store."),
    "check": ("copies", "Check a store or an exported file of others before it is used."),
    "migrate": ("copies", "Bring a store of an older format up to date."),
    "demo-model": ("demo_model", "Write a small language model and its tokenizer to DIR."),
}


class LazyGroup(click.Group):
    """A group that imports the module of a command only when the command is run, and translates errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order of the help text."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f".{COMMANDS[cmd_name][0]}", __package__)
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(module, name + "_" if iskeyword(name) else name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run a command. What goes wrong ends as one clear line; what nobody foresaw keeps its traceback."""
        try:
            return super().invoke(ctx)
        except PromptDBError as error:
            exit_code = 1 if isinstance(error, NodeNotFoundError) else 2
            raise Failure(error.message, error.hint, exit_code) from error
        except (KeyboardInterrupt, click.Abort):
            click.echo("\nInterrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            _discard(sys.stdout)
            ctx.exit(BROKEN_PIPE)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="promptdb")
def cli() -> None:
    """Keep what a language model computes for a prompt: keys and values, logits, log-probabilities.

    \b
    Example:
      promptdb demo-model demo
      promptdb put --model demo "Return the number" " of items"
      promptdb get --model demo "Return the number of items in the list"
    """


def main() -> None:
    """Run the command line and exit."""
    if sys.stdout is None:  # closed by the caller; nothing else may get its number
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 cannot show every token
            stream.reconfigure(errors="backslashreplace")
    try:
        exit_code = cli.main(prog_name="promptdb", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        exit_code = error.exit_code
    except click.Abort:
        exit_code = INTERRUPTED
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        exit_code = BROKEN_PIPE
    except OSError as error:
        _discard(sys.stdout)
        click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
        exit_code = 2
    sys.exit(exit_code)


def _discard(stream: TextIO) -> None:
    """Send what is still buffered nowhere, so that the interpreter does not fail on it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
