"""The threads of torch's operations on a CPU, on which compiled kernels run too.

They are GNU OpenMP's, by `GOMP_parallel` (its interface: "libgomp ABI", GCC's manual). Threads of our own would share
their cores with those, which go on spinning between two of torch's operations: measured on two cores, attention of a
step took 34 ms so in place of 20.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch

from server.errors import StartupError


def _openmp() -> ctypes.CDLL:
    """GNU OpenMP; `OSError` where torch has not loaded it."""
    return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)


def check_threads() -> None:
    """Raises `StartupError` where OpenMP may give an operation fewer threads than torch asks for: oneDNN's products of
    packed weights do not notice, and leave a part of their result unwritten."""
    try:
        openmp = _openmp()
    except OSError:  # another OpenMP, or none
        return
    wanted, limit = torch.get_num_threads(), openmp.omp_get_thread_limit()
    if limit < wanted:
        raise StartupError(
            f"OMP_THREAD_LIMIT={limit} is below torch's thread count, {wanted}; set OMP_NUM_THREADS={limit} instead"
        )
    if openmp.omp_get_dynamic():
        raise StartupError("OMP_DYNAMIC lets operations have fewer threads than torch counts on; unset it")


class TorchThreads:
    """The threads of torch's OpenMP."""

    def __init__(self) -> None:
        """Raises `OSError` where torch has not loaded GNU OpenMP."""
        openmp = _openmp()
        self._parallel = openmp.GOMP_parallel
        self._parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._parallel.restype = None
        self.barrier = ctypes.cast(openmp.GOMP_barrier, ctypes.c_void_p).value or 0
        """Address of the function in which a kernel's threads wait until all of them have come."""

    def run(self, kernel: Any, record: int, pieces: int) -> None:
        """Run a compiled function, `void(record *)`, on all of them, and wait; a single piece of work on this one.

        `record` is an address. Not on some of them: GNU OpenMP then ends the others, and starts them anew next time.
        """
        self._parallel(kernel.address, record, torch.get_num_threads() if pieces > 1 else 1, 0)
