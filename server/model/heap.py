"""Where the process's memory lies: what is freed stays with it, and what stays lies on huge pages."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np

logger = logging.getLogger("medley.memory")

# <malloc.h> of glibc: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, the latter at most 32 MiB
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 1024**2
_COLLAPSE = 25  # <linux/mman.h>: MADV_COLLAPSE, which the standard library's `mmap` does not name
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # absent where the system has none
_LARGEST_PIECE = 32 * 1024**2  # where pages are of 64 kB huge ones are of 512 MiB: too much to fill for a half
_REGIONS = Path("/proc/self/maps")  # `smaps`, which more read, takes longer the more memory there is
_OWN = (b"[heap]", b"[anon")  # or no name at all
_MOST_FAILURES = 3
_PAGEMAP = Path("/proc/self/pagemap")  # for each page 8 bytes, whose highest bit says that it is there
_ENTRY_BYTES, _PRESENT = 8, np.uint64(63)


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
    """All of `moves_to_huge_pages` at once."""
    for _ in moves_to_huge_pages():
        pass


def moves_to_huge_pages() -> Iterator[None]:
    """Copy what this process has written, a base's weights above all, onto huge pages; addresses stay. With each
    element one piece of memory is looked at, and moved if need be: that takes some 7 ms, in which other threads wait
    for what they ask of it, or for new memory.

    A base takes some hundred thousand of the usual 4 kB pages, scattered over whatever a system that has run for long
    had free, which makes the same steps slow in one process and fast in another. Pieces of which less than half has
    been touched stay as they are: of stacks, the KV cache, the bank; half touched is wholly there afterwards. So does
    what the kernel cannot move (before Linux 6.1, or with too little memory), all of it where the system's setting is
    `never`, and where the kernel does not say what is touched, which is logged.
    """
    moved = 0
    try:
        for size in _moves():
            moved += size
            yield
    except OSError as error:
        logger.info("memory is not moved to huge pages: %s", error)
    else:
        logger.debug("memory on huge pages: %s MiB", moved // 2**20)


def _moves() -> Iterator[int]:
    """Of one piece after the other the bytes that lie on a huge page now and were touched."""
    if not _HUGE_PAGES.exists() or "[never]" in (_HUGE_PAGES / "enabled").read_text():
        return
    size = int((_HUGE_PAGES / "hpage_pmd_size").read_text())
    if size > _LARGEST_PIECE:
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    failures = 0  # in a row
    with _PAGEMAP.open("rb", buffering=0) as pagemap:
        for piece in _pieces(size):
            # a region may hold weights and an untouched cache side by side, so each piece of it is looked at
            if _touched(pagemap, piece, size) < 0.5:
                yield 0
                continue
            is_moved = madvise(piece, size, _COLLAPSE) == 0
            # out of memory, where to go on would take from others what they have in the way; or no longer there
            failures = failures + 1 if not is_moved and ctypes.get_errno() == errno.ENOMEM else 0
            if failures == _MOST_FAILURES:
                return
            yield size if is_moved else 0


def _pieces(size: int) -> Iterator[int]:
    """The addresses of whole pieces of this size in the process's own memory."""
    for region in filter(None, _REGIONS.read_bytes().split(b"\n")):  # names of files may hold any other byte
        addresses, permissions, _, _, _, *name = region.split(maxsplit=5)
        if permissions == b"rw-p" and (not name or name[0].startswith(_OWN)):
            start, stop = (int(address, 16) for address in addresses.split(b"-"))
            yield from range(-(-start // size) * size, stop // size * size, size)


def _touched(pagemap: FileIO, start: int, size: int) -> float:
    """The share of this memory's pages that are there, 0 to 1."""
    pagemap.seek(start // mmap.PAGESIZE * _ENTRY_BYTES)
    entries = np.frombuffer(pagemap.read(size // mmap.PAGESIZE * _ENTRY_BYTES), np.uint64)
    return float((entries >> _PRESENT).mean()) if len(entries) else 0.0
