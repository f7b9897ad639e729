"""What stays in memory moves to huge pages: the same numbers at the same addresses, and nothing that was not used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.model.heap import move_to_huge_pages, moves_to_huge_pages

# One mapping, so that the kernel sees one region: little of it is used, and that part must move all the same.
_PROGRAM = """
import ctypes, mmap, re
import numpy as np
from server.model.heap import move_to_huge_pages

MIB = 2**20
memory = mmap.mmap(-1, 1024 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
numbers = np.frombuffer(memory, np.int64)
numbers[: 64 * MIB // 8] = np.arange(64 * MIB // 8)
numbers[128 * MIB // 8 :: 16 * MIB // 8] = 1
address = numbers.ctypes.data

def of_region(field):
    total = 0
    for part in re.split("(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read())[1:]:
        start, stop = (int(text, 16) for text in part.split()[0].split("-"))
        if start <= address < stop or address <= start < address + 1024 * MIB:
            total += int(re.search(field + r": +([0-9]+)", part)[1]) // 1024
    return total

before, resident = of_region("AnonHugePages"), of_region("Rss")
move_to_huge_pages()
assert (numbers[: 64 * MIB // 8] == np.arange(64 * MIB // 8)).all() and numbers.ctypes.data == address
after, growth = of_region("AnonHugePages"), of_region("Rss") - resident
madvise = ctypes.CDLL(None).madvise
madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
can_move = madvise(-(-address // (2 * MIB)) * 2 * MIB, 2 * MIB, 25) == 0  # MADV_COLLAPSE
print(before, after, growth, int(can_move))
"""


def test_what_is_used_lies_on_huge_pages_and_what_is_not_stays_untouched() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("transparent huge pages are switched off here, or given without being asked for")
    result = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    before, after, growth, can_move = map(int, result.stdout.split())
    if not can_move:
        pytest.skip("this kernel moves nothing to huge pages")
    assert before == 0
    assert after >= 32  # of 64 MiB: others may have taken the memory that lies in such pieces
    assert growth <= 8


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The system's, which may be written."""
    (tmp_path / "hpage_pmd_size").write_text(str(2**21))
    monkeypatch.setattr("server.model.heap._HUGE_PAGES", tmp_path)
    return tmp_path / "enabled"


def test_a_process_that_may_not_look_at_its_memory_says_so_and_goes_on(
    setting: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    setting.write_text("always [madvise] never")
    monkeypatch.setattr("server.model.heap._REGIONS", tmp_path / "none")
    with caplog.at_level("INFO", "medley.memory"):
        move_to_huge_pages()
    assert "not moved" in caplog.text


def test_names_of_mapped_files_may_hold_any_byte(
    setting: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    setting.write_text("always [madvise] never")
    regions = tmp_path / "maps"
    regions.write_bytes(b"7f0000000000-7f0000001000 r--p 00000000 00:1b 7 /x/\xe9\x0c\x1c \xc2\x85\n")
    monkeypatch.setattr("server.model.heap._REGIONS", regions)
    with caplog.at_level("DEBUG", "medley.memory"):
        move_to_huge_pages()
    assert "memory on huge pages: 0 MiB" in caplog.text


def test_what_cannot_be_moved_is_passed_in_pieces_too(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.write_text("always [madvise] never")
    monkeypatch.setattr("server.model.heap._pieces", lambda size: iter(range(0, 10 * size, size)))
    monkeypatch.setattr("server.model.heap._touched", lambda pagemap, piece, size: float(piece >= 5 * size))
    assert len(list(moves_to_huge_pages())) == 5 + 2, "the untouched ones; of pieces at no address three in a row"


def test_where_the_setting_is_never_nothing_is_looked_at(
    setting: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    setting.write_text("always madvise [never]")
    monkeypatch.setattr("server.model.heap._REGIONS", tmp_path / "none")
    with caplog.at_level("INFO", "medley.memory"):
        move_to_huge_pages()
    assert "not moved" not in caplog.text
