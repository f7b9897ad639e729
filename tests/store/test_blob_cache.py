"""The cache in front of a bucket: bounded, verified, least recently used leaves, what is in use never."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from adapters_store.blobs.cache import BlobCache

SIZE = 1000  # of each blob of these tests
CAPACITY = 10 * SIZE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> BlobCache:
    return BlobCache(folder, CAPACITY)


@pytest.fixture
def ages() -> Iterator[int]:
    """Times of use, each later than the one before; the clock's own may be equal for two files."""
    return iter(range(1_000_000_000, 1_001_000_000))


def blob(number: int, size: int = SIZE) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


def name(number: int, size: int = SIZE) -> str:
    return hashlib.sha256(blob(number, size)).hexdigest()


def add(cache: BlobCache, folder: Path, number: int, size: int = SIZE) -> None:
    staged = folder.parent / "staged"
    staged.write_bytes(blob(number, size))
    cache.add(name(number, size), staged)
    staged.unlink()


def age(folder: Path, number: int, when: int) -> None:
    os.utime(folder / name(number)[:2] / name(number), (when, when))


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def held(cache: BlobCache, folder: Path) -> set[int]:
    return {number for number in range(100) if (folder / name(number)[:2] / name(number)).exists()}


def test_the_least_recently_used_leave_and_the_bound_holds(cache: BlobCache, folder: Path, ages: Iterator[int]) -> None:
    for number in range(30):
        add(cache, folder, number)
        age(folder, number, next(ages))
        if number >= 2:
            assert cache.read(name(2)) == blob(2)  # used again and again: it stays
            age(folder, 2, next(ages))
        assert total(folder) <= CAPACITY
    left = held(cache, folder)
    assert {2, 29} <= left
    assert left - {2} == set(range(31 - len(left), 30))  # of the others the newest


def test_reading_and_opening_count_as_use(cache: BlobCache, folder: Path, ages: Iterator[int]) -> None:
    for number in range(10):
        add(cache, folder, number)
        age(folder, number, next(ages))
    assert cache.read(name(0)) == blob(0)
    with cache.file(name(1)) as path:
        assert path is not None
    add(cache, folder, 10)
    left = held(cache, folder)
    assert {0, 1, 10} <= left
    assert 2 not in left


@pytest.mark.parametrize("owner", ["this process", "another process"])
def test_what_is_in_use_never_leaves(cache: BlobCache, folder: Path, ages: Iterator[int], owner: str) -> None:
    for number in range(3):
        add(cache, folder, number)
        age(folder, number, next(ages))
    with ExitStack() as uses:
        if owner == "this process":
            path = uses.enter_context(cache.file(name(1)))
        else:
            hold = (
                "import pathlib, sys; from adapters_store.blobs.cache import BlobCache\n"
                f"with BlobCache(pathlib.Path(sys.argv[1]), {CAPACITY}).file(sys.argv[2]) as path:\n"
                "    print(path, flush=True); sys.stdin.read()"
            )
            other = uses.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", hold, str(folder), name(1)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            assert other.stdout is not None
            path = Path(other.stdout.readline().strip())
        age(folder, 1, 1)  # the least recently used of all
        for number in range(3, 30):
            add(cache, folder, number)
        assert path is not None
        assert path.read_bytes() == blob(1)
        assert held(cache, folder) & {0, 1, 2} == {1}
    age(folder, 1, 1)
    for number in range(30, 60):
        add(cache, folder, number)
    assert 1 not in held(cache, folder)


def test_a_damaged_copy_is_no_copy(cache: BlobCache, folder: Path) -> None:
    for number in (0, 1):
        add(cache, folder, number)
        (folder / name(number)[:2] / name(number)).write_bytes(b"other")
    assert cache.read(name(0)) is None
    with cache.file(name(1)) as path:
        assert path is None
    assert held(cache, folder) == set()


def test_what_was_never_added_is_absent(cache: BlobCache) -> None:
    assert cache.read(name(0)) is None
    with cache.file(name(0)) as path:
        assert path is None
    cache.remove(name(0))


def test_a_blob_larger_than_the_cache_is_the_only_one_and_leaves_first(cache: BlobCache, folder: Path) -> None:
    for number in range(5):
        add(cache, folder, number)
    add(cache, folder, 5, 2 * CAPACITY)
    assert total(folder) == 2 * CAPACITY
    assert cache.read(name(5, 2 * CAPACITY)) == blob(5, 2 * CAPACITY)
    add(cache, folder, 6)
    assert total(folder) == SIZE


def test_a_later_process_goes_on_with_what_is_there(cache: BlobCache, folder: Path) -> None:
    for number in range(8):
        add(cache, folder, number)
    again = BlobCache(folder, CAPACITY)
    assert again.read(name(3)) == blob(3)
    assert total(folder) == 8 * SIZE
    smaller = BlobCache(folder, CAPACITY // 2)
    assert total(folder) <= CAPACITY // 2
    add(smaller, folder, 9)
    assert total(folder) <= CAPACITY // 2


def test_what_another_process_adds_is_seen_before_the_bound_is_far_behind(cache: BlobCache, folder: Path) -> None:
    other = BlobCache(folder, CAPACITY)
    for number in range(0, 60, 2):
        add(cache, folder, number)
        add(other, folder, number + 1)
        assert total(folder) <= CAPACITY + SIZE
