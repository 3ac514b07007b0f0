"""Shuffled batches of recorded activations, streamed from a store: for probes and sparse autoencoders.

This module must be imported where torch may be: the dataset is a ``torch.utils.data.IterableDataset``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from promptdb.activations import Series, Shard, entry_of
from promptdb.buffers import POOL
from promptdb.errors import CorruptDataError, InputTypeError, NotRecordedError

if TYPE_CHECKING:
    from promptdb.db import PromptDB

__all__ = ["ActivationDataset"]

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class ActivationDataset(IterableDataset):  # type: ignore[type-arg]
    """Batches ``[batch_size, d]`` of one series of a store, in an order that depends on seed, epoch and workers only.

    Made by :meth:`PromptDB.activation_dataset`. Spans are put in random order and read in blocks of at least
    ``shuffle_buffer`` rows; each block is shuffled as a whole. So two rows of one span are in one block, at places that
    are uniformly random in it, and rows of different spans are near each other with the same probability as any.
    Without shuffling (``shuffle_buffer=0``) rows come in the order of the spans' IDs.

    Parameters
    ----------
    db : the store; each worker process opens it by its path.
    series : what to read.
    shards : where the rows are; fixed when the dataset is made: what is recorded later is not seen.
    batch_size : rows of a batch; the last one of each worker may be shorter.
    shuffle_buffer : rows that are shuffled together. A block of them is in memory.
    seed : of the order.

    Notes
    -----
    Pass it to ``DataLoader(dataset, batch_size=None, num_workers=w)``. Each row comes once in an epoch, from one
    worker. ``set_epoch`` gives another order; ``resume`` goes on where a run stopped, with the same number of workers,
    and reads no block that was used up. Spans that vanish meanwhile are an error: pin them.
    """

    def __init__(
        self,
        db: PromptDB,
        series: Series,
        shards: Sequence[Shard],
        *,
        batch_size: int,
        shuffle_buffer: int,
        seed: int,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("shuffle_buffer", shuffle_buffer, 0)):
            if type(value) is not int or value < least:
                raise InputTypeError(f"{name} is {value!r}", f"choose an integer of {least} or more")
        self.series, self.shards = series, tuple(shards)
        self.batch_size, self.shuffle_buffer, self.seed = batch_size, shuffle_buffer, seed
        self.epoch, self._skip = 0, 0
        self._path, self._kind = db.path, type(db)
        self._db: PromptDB | None = db

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(shard.num_rows for shard in self.shards)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, and begin it at its start."""
        self.epoch, self._skip = epoch, 0

    def resume(self, epoch: int, num_batches: int) -> None:
        """Let the next iteration begin after the first ``num_batches`` of an epoch, as a DataLoader counted them."""
        if num_batches < 0:
            raise InputTypeError(f"num_batches is {num_batches}")
        self.epoch, self._skip = epoch, num_batches

    def __getstate__(self) -> dict[str, Any]:
        if self._path is None:
            raise InputTypeError("a store in memory cannot be read by other processes", "DataLoader(num_workers=0)")
        return {**self.__dict__, "_db": None}  # an open store does not go to another process

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        worker, skip = self._place(worker, workers)
        if info is None and self._db is not None:
            yield from self._batches(self._db, worker, workers, skip)
            return
        if self._path is None:
            raise InputTypeError("a store in memory cannot be read by other processes", "DataLoader(num_workers=0)")
        with self._kind(self._path, readonly=True) as db:
            yield from self._batches(db, worker, workers, skip)

    def _place(self, worker: int, workers: int) -> tuple[int, int]:
        """Return whose batches a worker gives, and how many of those are skipped.

        A DataLoader takes from its workers in turns, from those that are left: the first one now goes on where it was.
        """
        left = [0] * workers
        for number, block in enumerate(self._blocks()):
            left[number % workers] += sum(shard.num_rows for shard in block)
        left = [-(-rows // self.batch_size) for rows in left]
        skipped, turn = [0] * workers, 0
        for _ in range(min(self._skip, sum(left))):
            while skipped[turn] == left[turn]:
                turn = (turn + 1) % workers
            skipped[turn] += 1
            turn = (turn + 1) % workers
        own = (worker + turn) % workers
        return own, skipped[own]

    def _blocks(self) -> list[list[Shard]]:
        shards = list(self.shards)
        if self.shuffle_buffer:
            random.Random(f"{self.seed} {self.epoch}").shuffle(shards)
        blocks: list[list[Shard]] = [[]]
        count = 0
        for shard in shards:
            if count >= max(self.shuffle_buffer, self.batch_size):
                blocks.append([])
                count = 0
            blocks[-1].append(shard)
            count += shard.num_rows
        return blocks

    def _batches(self, db: PromptDB, worker: int, workers: int, skip: int) -> Iterator[torch.Tensor]:
        left: torch.Tensor | None = None
        to_skip = skip * self.batch_size
        blocks = self._blocks()
        for number in range(worker, len(blocks), workers):
            block = blocks[number]
            count = sum(shard.num_rows for shard in block)
            if to_skip >= count:
                to_skip -= count
                continue
            rows = self._read(db, block, count)
            if self.shuffle_buffer:
                generator = torch.Generator().manual_seed(hash_of(self.seed, self.epoch, number))
                rows = rows[torch.randperm(count, generator=generator)]
            rows, to_skip = rows[to_skip:], 0
            if left is not None:
                rows = torch.cat((left, rows))
            whole = rows.shape[0] // self.batch_size * self.batch_size
            if whole:  # no rows split into one empty batch
                yield from torch.split(rows[:whole], self.batch_size)
            left = rows[whole:]
        if left is not None and left.shape[0]:
            yield left

    def _read(self, db: PromptDB, block: Sequence[Shard], count: int) -> torch.Tensor:
        memory: Any = None
        shape: tuple[int, ...] = ()
        target, at = memoryview(b""), 0
        with db.read() as snapshot:
            for shard in block:
                entry = entry_of(snapshot, shard.node, self.series, shard.span_tokens)
                if entry is None or entry.num_rows < shard.num_rows:
                    raise NotRecordedError(
                        f"{self.series} of span {shard.node[:8].hex()} is not stored any more", "make the dataset again"
                    )
                if memory is None:
                    memory, shape = POOL.lease(count * entry.row_bytes), entry.rows.shape[1:]
                    target = memoryview(memory).cast("B")
                if entry.rows.shape[1:] != shape:
                    raise CorruptDataError(f"rows of {self.series} have several shapes")
                size = shard.num_rows * entry.row_bytes
                target[at : at + size] = entry.rows.data[:size]
                at += size
        dtype = getattr(torch, _TORCH_NAMES[self.series.dtype])
        return torch.frombuffer(memory, dtype=dtype, count=at // dtype.itemsize).view(count, *shape)


def hash_of(*numbers: int) -> int:
    """Return a seed that depends on all of several numbers, on every machine alike."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(63)
