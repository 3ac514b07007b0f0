"""Text that every machine has, and tokenizers made from it, for demos and tests."""

from __future__ import annotations

import ast
import functools
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from promptdb.errors import InputTypeError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["VOCAB_SIZE", "byte_tokenizer", "corpus", "demo_tokenizer"]

END_OF_TEXT = "<|endoftext|>"  # always token 0: beginning and end of sequence
PADDING = "<|pad|>"  # always token 1: apart from the end of text, so that a mask can be told from the IDs

VOCAB_SIZE = 2048  # of the trained model: small enough that its output layer does not eat the training time


def demo_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any Unicode text round-trips, and nothing is unknown.

    Parameters
    ----------
    texts : what to learn merges from.
    vocab_size : most tokens that it may have, at least 258: 256 bytes, ``<|endoftext|>`` (0) and ``<|pad|>`` (1).

    Returns
    -------
    PreTrainedTokenizerFast
        The same for the same texts. It adds no special tokens to what it encodes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if isinstance(texts, str):
        raise InputTypeError("texts is one str", "give an iterable of str, for example [text]")
    if vocab_size < 258:
        raise ModelError(f"a vocabulary of {vocab_size} cannot hold all bytes", "give a vocab_size of 258 or more")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


_PARAGRAPH = """\
The cache keeps what the model has read, so that the next prompt which begins with the same words need not be read
again. A prompt is a list of tokens; a span of tokens is stored once, under the hash of all that comes before it. When
another prompt parts from the first one, only the rest of the text is computed, and the store has both of them. Return
the number of tokens that were loaded and the number of tokens that were computed. Hello there, and thank you.
"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, trained in milliseconds on a fixed paragraph; fits tiny models' 512 tokens.

    Any Unicode text round-trips; characters outside ASCII take several tokens, and so do most words.
    """
    return demo_tokenizer([_PARAGRAPH], vocab_size=384)


# Test text is not prose, encodings are tables, and the rest is old or says the same again.
_SKIPPED = {"test", "tests", "encodings", "distutils", "idlelib", "lib2to3", "turtledemo"}


@functools.cache
def corpus(max_chars: int = 2_000_000) -> str:
    """Collect prose about Python from this machine: docstrings and help topics of the standard library.

    Parameters
    ----------
    max_chars : the text ends with the last document that fits.

    Returns
    -------
    str
        Documents with a blank line between them, in the order of their module paths; each paragraph is one line, and
        code and tables are left out. About 1.3 million characters, the same for one version of Python.

    Notes
    -----
    Sources are parsed, never imported. About 3 seconds the first time in a process.
    """
    kept: list[str] = []
    num_chars = 0
    for document in _documents():
        num_chars += len(document) + 2
        if num_chars > max_chars:
            break
        kept.append(document)
    return "\n\n".join(kept)


def _documents() -> Iterator[str]:
    seen: set[str] = set()
    for path in _stdlib_files():
        source = path.read_text("utf-8", errors="replace")
        topics = path.name == "topics.py"  # one dict of help texts
        # A file with little text for its length would cost more time than it gives words.
        if not topics and source.count('"""') * 1500 < len(source):
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for text in _strings(tree) if topics else _docstrings(tree):
            prose = _prose(text)
            if prose and prose not in seen:
                seen.add(prose)
                yield prose


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        # Not packages: site-packages, config-3.11-x86_64-linux-gnu.
        folders[:] = [name for name in folders if name.isidentifier() and name not in _SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _strings(tree: ast.AST) -> Iterator[str]:
    return (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
            todo += reversed(node.body)


def _prose(text: str) -> str:
    kept = []
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        num_plain = sum(char.isalpha() or char == " " for char in paragraph)
        looks_like_code = ">>>" in paragraph or "::" in paragraph or num_plain < 0.9 * len(paragraph)
        if len(paragraph) > 15 and " " in paragraph and paragraph[0].isalpha() and not looks_like_code:
            kept.append(paragraph)
    return "\n".join(kept)
