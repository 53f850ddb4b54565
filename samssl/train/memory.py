"""Memory that a training process keeps, instead of asking the system for it anew in every step."""

import ctypes
import sys

GIB = 2**30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 32 << 20
"""Bytes of the largest blocks that are kept: glibc takes no higher threshold, and keeping tensors of any size
let the heap fragment to several times what was in use."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees; whether that could be arranged (glibc only).

    A step on a CPU frees and takes gigabytes in tensors. Each time they come from the system anew, every
    page of them is faulted in: a quarter of a step of ViT-B at 1024 px, in bf16. Blocks beyond 32 MiB still
    go back to the system.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
