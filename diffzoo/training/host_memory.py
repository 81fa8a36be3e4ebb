"""Training on a CPU keeps the memory that it frees.

A training step frees and takes again gigabytes: activations, gradients, casts of weights. glibc gives freed memory back
to the system as soon as 64 MiB are free at the end of its heap, and every 4 KiB taken again cost a page fault, about a
microsecond. Therefore the process keeps freed memory.

Without this, a training step takes longer by a factor of 1.26 (dimr_xl_256, five blocks a stage) and 1.30
(uvit_bao_l_256, five blocks) in bfloat16, 1.05 and 1.08 in float32; one image, AdamW, one thread of an AMD EPYC,
medians of five pairs of processes that took turns. `benchmarks/official.py --default-malloc` shows the same at full
depth.
"""

import ctypes

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER, _ONE_GIB = -1, 2**30


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next step; whether its C library can.

    Blocks of less than 1 GiB come from the heap, which is never cut short. What a process takes at most stays the same,
    but for what the heap's gaps cost. Has an effect with glibc (Linux) alone, and not where an allocator such as
    jemalloc is loaded in its place, which keeps memory anyway.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _ONE_GIB)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
