"""Fixtures that more than one file uses: tiny models, a tokenizer, and stores that are sound when a test ends."""

from __future__ import annotations

import os
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

pytest.register_assert_rewrite("promptdb.testing", "promptdb.testing_shared")

from shared_tools import machine  # noqa: E402, F401 - a fixture

from promptdb import PromptDB  # noqa: E402

# Compared with a single pass, exactly (to 1e-5 in float32).
SUPPORTED = (
    "gpt2", "opt", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "falcon", "olmo2",
    "qwen3_moe", "deepseek_v3", "bloom", "mpt", "gptj",
)  # fmt: skip
# Their state is more than keys and values.
REFUSED = ("qwen3_next", "mamba", "lfm2", "granitemoehybrid")

TEXT = (
    "Hello there. General Kenobi, you are a bold one.\n\nNaïve café: 你好, 🙂🙃! The quick brown fox jumps over the "
    "lazy dog, again and again, 1234567890 times; then it rests.\n"
)


@cache
def shared_model(arch: str):
    """Return a tiny random model that no test may change."""
    from promptdb.demo_models import random_model

    return random_model(arch)


@pytest.fixture(autouse=True, scope="module")
def models_of_its_own():
    """Give every file its own shared models: one that a test changes must not fail another file's tests."""
    shared_model.cache_clear()


@cache
def shared_tokenizer():
    from promptdb.demo_text import byte_tokenizer

    return byte_tokenizer()


def plain_logits(model, token_ids):
    """Return the logits ``[vocabulary]`` after the last of some tokens, from one pass of the model."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(token_ids)])).logits[0, -1]


@pytest.fixture
def tokenizer():
    return shared_tokenizer()


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "store.promptdb"


@pytest.fixture
def db(store_path):
    """A store on disk with short chunks, whose every byte must hold when the test ends."""
    with PromptDB(store_path, chunk_tokens=16) as db:
        yield db
        assert db.verify() == []


@pytest.fixture
def filled(tmp_path):
    """A store on disk with a tree, and its prompts."""
    from archive_tools import put

    prompts = [(*range(number), 1_000 + number, *range(30)) for number in range(0, 40, 3)]
    with PromptDB(tmp_path / "filled", chunk_tokens=8) as db:
        for tokens in prompts:
            put(db, tokens, logits=[len(tokens)])
        yield db, prompts
