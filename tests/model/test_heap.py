"""What stays in memory moves to huge pages: the same numbers at the same addresses, and nothing that was not used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import numpy, psutil
from server.model.heap import move_to_huge_pages

def on_huge_pages():
    words = open("/proc/self/smaps_rollup").read().split()
    return int(words[words.index("AnonHugePages:") + 1]) * 1024

used = numpy.arange(2**24)
unused = numpy.empty(2**27)  # a gigabyte
unused[::2**20] = 1.0
address, before, resident = used.ctypes.data, on_huge_pages(), psutil.Process().memory_info().rss
move_to_huge_pages()
assert (used == numpy.arange(2**24)).all() and used.ctypes.data == address
assert psutil.Process().memory_info().rss < resident + 2**27
print(on_huge_pages() - before)
"""


def test_what_is_used_lies_on_huge_pages_and_what_is_not_stays_untouched() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    result = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    if result.stdout.split() == ["0"]:
        pytest.skip("this kernel moves nothing to huge pages")
    assert int(result.stdout) > 0.9 * 2**27  # bytes of `used`
