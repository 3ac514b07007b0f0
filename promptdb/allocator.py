"""What the C allocator does with memory that a commit has used."""

from __future__ import annotations

import ctypes
import os
from functools import cache

# glibc keeps what is freed up to twice the largest block that was ever mapped and freed, of which it counts blocks up
# to 32 MiB (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
_LEARNT_BYTES = (32 << 20) - (8 << 10)
KEPT_BYTES = 2 * _LEARNT_BYTES


@cache
def keep_freed_memory() -> None:
    """Let the allocator keep up to 64 MiB of freed memory, once in a process.

    LMDB takes memory for all that a transaction writes and frees it at its end. Given back to the system, it comes back
    as fresh pages, and touching these takes longer than writing them to a file: a commit of 19 MB takes 25 ms where
    they stay, and 45 to 65 ms where they do not.

    Does what a program does to glibc that once frees a block of 32 MiB, and changes nothing for those who have set
    thresholds of their own (``MALLOC_TRIM_THRESHOLD_`` and others). Other allocators take and free a block that nobody
    touches. Cost: microseconds.
    """
    if os.name != "posix":
        return
    process = ctypes.CDLL(None)
    process.malloc.restype, process.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    process.free.restype, process.free.argtypes = None, [ctypes.c_void_p]
    process.free(process.malloc(_LEARNT_BYTES))
