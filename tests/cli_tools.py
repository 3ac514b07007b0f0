"""What the tests of the command line share: running commands, and checkpoints on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result
from promptdb.cli.main import cli

from promptdb.demo_models import random_model
from promptdb.demo_text import byte_tokenizer

TIMEOUT_S = 120


def write_checkpoint(directory: Path, arch: str = "llama", **options) -> str:
    """Write a tiny random model and its tokenizer; return the directory as an argument."""
    random_model(arch, **options).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def run(*args: object, code: int | None = 0, stdin: str | bytes | None = None) -> Result:
    """Run a command in this process; what it raises and does not handle is raised here."""
    result = CliRunner().invoke(cli, list(map(str, args)), input=stdin, catch_exceptions=False)
    assert code is None or result.exit_code == code, result.output
    return result


def run_json(*args: object, code: int | None = 0, stdin: str | None = None) -> dict:
    """Run a command with ``--json`` and return its one document."""
    (document,) = run_lines(*args, code=code, stdin=stdin)
    return document


def run_lines(*args: object, code: int | None = 0, stdin: str | None = None) -> list[dict]:
    """Run a command with ``--json`` and return its documents."""
    return [json.loads(line) for line in run(*args, "--json", code=code, stdin=stdin).stdout.splitlines()]


def spawn(*args: object, **options) -> subprocess.CompletedProcess:
    """Run the installed command in a process of its own."""
    options = {"capture_output": True, "timeout": TIMEOUT_S} | options
    return subprocess.run([*command(), *(arg if isinstance(arg, bytes) else str(arg) for arg in args)], **options)


def command() -> list[str]:
    """Return how to start the command with this interpreter."""
    return [sys.executable, "-c", "from promptdb.cli.main import main; main()"]
