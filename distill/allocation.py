"""What becomes of the memory that a training step frees: it is kept for the next step."""

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# The largest that glibc takes: larger blocks come from the system each time.
_LARGEST_KEPT = 32 * 2**20


def keep_freed_memory() -> None:
    """Makes this process keep what tensors on the CPU free, instead of giving it back to the system; for glibc.

    Otherwise a step asks for much of its memory anew, and the system clears it page by page: five thousand page faults
    a step of resnet8x4, and 4 to 8 % of the time, were measured on a virtual machine. Threads that are started later
    share one heap: with one each, of at most 64 MB, students trained side by side got most tensors from the system.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Other C libraries, such as musl, have none.
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_ARENA_MAX, 1)
