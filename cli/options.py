"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from promptdb.keys import KV_CODECS

from .quantities import duration_option

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def store_options(command: Command) -> Command:
    """Add ``--db`` (as ``path``) and ``--json`` (as ``as_json``)."""
    return db_option(click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command))


def db_option(command: Command) -> Command:
    """Add ``--db`` (as ``path``)."""
    return click.option(
        "--db",
        "path",
        metavar="PATH",
        envvar="PROMPTDB_PATH",
        show_envvar=True,
        help="Directory of the store; by default one in your data directory.",
    )(command)


def model_options(command: Command) -> Command:
    """Add ``--model``, ``--dtype`` and ``--namespace``."""
    command = click.option(
        "--namespace", default="", metavar="NAME", help="A tenant's salt: nothing is shared between namespaces."
    )(command)
    command = click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="What the weights are loaded as; auto is the checkpoint's own.",
    )(command)
    return click.option(
        "--model",
        required=True,
        metavar="M",
        envvar="PROMPTDB_MODEL",
        show_envvar=True,
        help="Directory of a checkpoint, or its ID on the Hugging Face hub.",
    )(command)


def kv_codec_option(command: Command) -> Command:
    """Add ``--kv-codec``."""
    return click.option(
        "--kv-codec",
        type=click.Choice([codec for codec in KV_CODECS if codec]),
        default=None,
        help="Keys and values in 8 bits: smaller and approximate, and never mixed with exact ones.",
    )(command)


def device_option(command: Command) -> Command:
    """Add ``--device``."""
    return click.option(
        "--device", metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:1, ...; by default CUDA if there is any."
    )(command)


def lifetime_options(command: Command) -> Command:
    """Add ``--tag`` and ``--ttl`` (as ``ttl_s``), for :func:`cli.lifetime.apply_lifetime` and ``PromptDB.ttl_s``."""
    command = click.option(
        "--ttl",
        "ttl_s",
        metavar="TIME",
        callback=duration_option,
        help="How long the prompts are kept: 12h, 7d, or none for ever; by default as `promptdb limits` says.",
    )(command)
    return click.option("--tag", metavar="NAME", help="A name to find the prompts by: `promptdb ls --tag NAME`.")(
        command
    )


def shared_option(command: Command) -> Command:
    """Add ``--shared``."""
    return click.option(
        "--shared",
        metavar="URL",
        envvar="PROMPTDB_SHARED",
        show_envvar=True,
        help="A store shared with other machines: redis://HOST, s3://BUCKET/PATH, file:///DIRECTORY; or none.",
    )(command)


def prompt_arguments(command: Command) -> Command:
    """Add ``TEXT...`` (as ``texts``) and ``--file`` (as ``files``)."""
    command = click.option(
        "--file",
        "files",
        multiple=True,
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        help='Read prompts: a .jsonl file has objects with "text" or "pieces"; any other file is one text.',
    )(command)
    return click.argument("texts", nargs=-1, metavar="[TEXT]...")(command)
