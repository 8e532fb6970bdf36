"""The C library's allocator, told to keep what is freed: a training step asks for the same large blocks again."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc takes no more


def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks in the place of returning their pages to the system at every step.

    A step of the embedded default spent 16 % of its CPU time on those pages otherwise. The results are the same.

    Returns:
      Whether it was set: False where the C library is another one (macOS, Windows, musl).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = {M_MMAP_THRESHOLD: LARGEST_MMAP_THRESHOLD, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 256 << 20}
    return all(mallopt(option, value) == 1 for option, value in options.items())
