"""Copies of many pieces: every byte arrives, from several threads and in forked children too, and errors are told."""

from __future__ import annotations

import os
import random
import threading

import pytest

from promptdb.gather import copy_all


def pieces(seed, total):
    """Return targets, and sources of odd sizes in memory of their own."""
    numbers = random.Random(seed)
    sources = []
    while sum(map(len, sources)) < total:
        sources.append(numbers.randbytes(numbers.choice((1, 17, 4096, 300_001))))
    return [bytearray(len(source)) for source in sources], sources


@pytest.mark.parametrize("total", [0, 1000, 1 << 20, 9 << 20])
def test_every_byte_arrives(total):
    targets, sources = pieces(total, total)
    copy_all([(target, memoryview(source)) for target, source in zip(targets, sources, strict=True)])
    assert targets == sources


def test_several_threads_and_forked_children_copy():
    wrong = []

    def work(seed):
        targets, sources = pieces(seed, 4 << 20)
        copy_all([(target, memoryview(source)) for target, source in zip(targets, sources, strict=True)])
        if targets != sources:
            wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    if hasattr(os, "fork"):
        child = os.fork()
        if not child:
            work(7)
            os._exit(len(wrong))
        assert os.waitpid(child, 0)[1] == 0


def test_errors_of_any_piece_are_raised():
    targets, sources = pieces(1, 4 << 20)
    copies = [(target, memoryview(source)) for target, source in zip(targets, sources, strict=True)]
    for at in (0, len(copies) // 2, len(copies) - 1):
        bad = [*copies]
        bad[at] = (bytearray(len(sources[at]) + 3), memoryview(sources[at] + b"12"))
        with pytest.raises(ValueError, match="broadcast"):
            copy_all(bad)
