"""Where the process's memory lies: what is freed stays with it, and what stays lies on huge pages."""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress
from pathlib import Path

import psutil

logger = logging.getLogger("medley.memory")

# <malloc.h> of glibc: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, the latter at most 32 MiB
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 1024**2
_COLLAPSE = 25  # <linux/mman.h>: MADV_COLLAPSE, which the standard library's `mmap` does not name
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # absent where the system has none
_AT_ONCE = 32  # huge pages: while so many are moved, some tenths of a second, the process cannot end
_ROLLUP = Path("/proc/self/smaps_rollup")


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what activations give back: each page that returns to the system costs a fault when
    it is touched again, and a layer's activations are freed and allocated some thousand times a second. Measured: the
    attention of a decode step of 64 rows takes up to four times as long without this. Elsewhere than glibc: nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def move_to_huge_pages() -> None:
    """Copy what this process has written so far, a base's weights above all, onto huge pages; addresses stay. Some
    hundred MiB a second; other threads go on meanwhile.

    Each page that is read needs its address looked up. Of the usual 4 kB a base has some hundred thousand, wherever a
    system that has run for long had some left, which makes the same steps slow in one process and fast in another.
    Regions that are mostly untouched are left as they are: stacks, the KV cache, the bank. So is what the kernel cannot
    move (before Linux 6.1, or where no memory is left in such pieces), and everything where the system's setting is
    `never`. At level debug the log says how much lies there.
    """
    if not _HUGE_PAGES.exists() or "[never]" in (_HUGE_PAGES / "enabled").read_text():
        return
    page = int((_HUGE_PAGES / "hpage_pmd_size").read_text())
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for region in psutil.Process().memory_maps(grouped=False):
        is_own = region.perms == "rw-p" and region.path in ("[anon]", "[heap]")
        start, stop = (int(address, 16) for address in region.addr.split("-"))
        start, stop = -(-start // page) * page, stop // page * page
        if is_own and 2 * region.rss >= region.size and start < stop:
            for at in range(start, stop, _AT_ONCE * page):  # goes on behind what it cannot move, and gives an error
                madvise(at, min(_AT_ONCE * page, stop - at), _COLLAPSE)
    words = _ROLLUP.read_text().split()
    logger.debug("memory on huge pages: %s MiB", int(words[words.index("AnonHugePages:") + 1]) // 1024)
