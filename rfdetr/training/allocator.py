"""Tune glibc's allocator for a training process, whose tensors come and go with every step."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

# mallopt(3) of glibc
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1
_LARGEST_IN_HEAP = 1 << 30  # bytes
_USER_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """Let the process keep freed memory for its next tensors; True if that was possible.

    By default glibc returns large blocks to the system at once, and every step pays for fresh,
    zeroed pages: 125,000 to 280,000 page faults in a training step of nano with batch 4 on a CPU.
    The peak stays the same. Nothing changes with another C library, or if the environment already
    configures glibc's allocator.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _USER_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = bool(mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP))
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER)) and kept
