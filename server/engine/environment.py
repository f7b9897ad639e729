"""The engine process's environment: what the C library is to be told before a process starts. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb"


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment`, in which glibc's malloc asks the kernel for huge pages, unless it says already whether to.

    Each step reads all weights and all rows' KV pages, and finds them by way of page tables; in a virtual machine such
    a walk is of two tables. glibc's manual has it under "Memory Allocation Tunables", from 2.35 on; another C library
    does not read it, and a kernel whose huge pages are off ignores it.
    """
    given = environment.get(_TUNABLES, "")
    if _HUGE_PAGES in given:
        return dict(environment)
    return {**environment, _TUNABLES: ":".join(filter(None, (given, f"{_HUGE_PAGES}=1")))}
