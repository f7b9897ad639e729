"""The engine's process asks for huge pages, and those who run it have the last word."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from server.engine.environment import with_huge_pages

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ALLOCATE = """
import torch
numbers = torch.ones(4 << 20)
print(sum("hg" in line.split() for line in open("/proc/self/smaps") if line.startswith("VmFlags")))
"""  # mappings that ask for huge pages; whether they have any is the kernel's matter (proc(5): VmFlags)


def test_what_else_is_tuned_stays() -> None:
    assert with_huge_pages({"HOME": "/"}) == {"HOME": "/", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    given = {"GLIBC_TUNABLES": "glibc.malloc.check=3"}
    assert with_huge_pages(given) == {"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.hugetlb=1"}


def test_who_says_whether_to_use_them_is_heard() -> None:
    given = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0:glibc.malloc.check=3"}
    assert with_huge_pages(given) == given


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35)
    or not _HUGE_PAGES.exists()
    or "[never]" in _HUGE_PAGES.read_text(encoding="ascii"),
    reason="needs glibc 2.35 and a kernel with huge pages",
)
def test_the_kernel_is_then_asked_for_them() -> None:
    def asking(environment: dict[str, str]) -> int:
        command = [sys.executable, "-c", _ALLOCATE]
        return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    assert asking(with_huge_pages(os.environ)) > asking({**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
