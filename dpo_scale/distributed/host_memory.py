"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Let freed blocks be used again instead of going back to the kernel; without glibc, nothing changes.

    By default every tensor above 32 MiB is mapped anew and its pages are cleared at first touch: in a step on CPUs,
    where gradient buckets come and go, that is a tenth of the time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST_INT)


def give_back_freed_memory() -> None:
    """Return to the kernel what is freed and kept: as much as half a model, once one is released."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
