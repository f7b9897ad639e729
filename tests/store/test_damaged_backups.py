"""Files that are no whole backup, or one of another release: refused by name, and nothing is restored."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapters_store import BackupDamaged, LocalBlobs, RedisIndex, restore_backup, write_backup
from tests.store.backups import dump, fill
from tests.store.samples import stored

pytestmark = pytest.mark.anyio


def rewrite(path: Path, change: Any) -> None:
    """Write the archive anew, each member's content as `change(name, content)` has it; None leaves it out."""
    with tarfile.open(path) as tar:
        members = [(member.name, content.read()) for member in tar if (content := tar.extractfile(member))]
    with tarfile.open(path, "w") as tar:
        for name, original in members:
            if (changed := change(name, original)) is not None:
                info = tarfile.TarInfo(name)
                info.size = len(changed)
                tar.addfile(info, io.BytesIO(changed))


@pytest.mark.parametrize("part", ["medley-backup.json", "index/", "blobs/", "end.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
async def test_a_damaged_file_is_refused_and_nothing_is_restored(
    part: str, damage: str, index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    await fill(index, blobs)
    path = tmp_path / "file"
    await write_backup(index, blobs, path)
    first = True

    def change(name: str, content: bytes) -> bytes | None:
        nonlocal first
        if not first or not name.startswith(part):
            return content
        first = False
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        return None if damage == "missing" else flipped

    rewrite(path, change)
    assert not first
    with pytest.raises(BackupDamaged, match=str(path)):
        await restore_backup(empty, other, path)
    assert set(await dump(empty)) == {"schema"}


async def test_a_cut_file_and_one_that_is_no_backup_are_refused(
    index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    await fill(index, blobs)
    path = tmp_path / "file"
    await write_backup(index, blobs, path)
    whole = path.read_bytes()
    for length in (0, 100, 700, 3000, len(whole) // 2, len(whole) - 15_000):
        path.write_bytes(whole[:length])
        with pytest.raises(BackupDamaged, match=str(path)):
            await restore_backup(empty, other, path)
    path.write_bytes(b"no archive" * 1000)
    with pytest.raises(BackupDamaged, match="no backup"):
        await restore_backup(empty, other, path)
    assert set(await dump(empty)) == {"schema"}


@pytest.mark.parametrize(("field", "word"), [("format", "format 9"), ("schema", "layout 9")])
async def test_a_backup_of_another_release_is_refused(
    field: str, word: str, index: RedisIndex, blobs: LocalBlobs, empty: RedisIndex, other: LocalBlobs, tmp_path: Path
) -> None:
    await fill(index, blobs)
    path = tmp_path / "file"
    await write_backup(index, blobs, path)
    header = {"format": b'{"format":9,"schema":"2","created":1}', "schema": b'{"format":1,"schema":"9","created":1}'}
    rewrite(path, lambda name, content: header[field] if name == "medley-backup.json" else content)
    with pytest.raises(BackupDamaged, match=word):
        await restore_backup(empty, other, path)


def altered(path: Path, change: Any) -> None:
    """The backup with its index's parts as `change(kind, values)` leaves them, as if it had been written so."""
    index = hashlib.sha256()

    def change_member(name: str, content: bytes) -> bytes:
        if name.startswith("index/"):
            parts = msgspec.msgpack.decode(content)
            for kind, _, values in parts:
                change(kind, values)
            content = msgspec.msgpack.encode(parts)
            index.update(content)
        elif name == "end.json":
            content = msgspec.json.encode({**msgspec.json.decode(content), "index_sha256": index.hexdigest()})
        return content

    rewrite(path, change_member)


def _drop(values: list[Any], field: str) -> None:
    at = values.index(field)
    del values[at : at + 2]


def _drop_from_json(values: list[Any], field: str) -> None:
    values[1] = values[1].replace(f'"{field}":', f'"not_{field}":')


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("task", lambda values: _drop(values, "settings"), "'settings'"),
        ("task", lambda values: _drop(values, "updated"), "'updated'"),
        ("versions", lambda values: _drop_from_json(values, "files"), "`files`"),
        ("api_keys", lambda values: _drop_from_json(values, "id"), "`id`"),
        ("digests", lambda values: values.__setitem__(1, "one"), "'one'"),
        ("customizations", lambda values: values.__setitem__(1, values[1][:20]), "'customizations' of"),
        ("customizations", lambda values: values.pop(), "'customizations' of"),
        ("words", lambda values: values.clear(), "'words' lacks"),
        ("payers", lambda values: values.clear(), "'payers' lacks"),
        ("history", lambda values: values.__setitem__(0, "[1]"), "'history' of"),
    ],
)
async def test_a_file_that_lacks_a_field_is_refused_by_its_name(
    kind: str,
    change: Any,
    named: str,
    index: RedisIndex,
    blobs: LocalBlobs,
    empty: RedisIndex,
    other: LocalBlobs,
    tmp_path: Path,
) -> None:
    await fill(index, blobs)
    path = tmp_path / "file"
    await write_backup(index, blobs, path)
    altered(path, lambda found, values: change(values) if found == kind else None)
    with pytest.raises(BackupDamaged, match=named) as refused:
        await restore_backup(empty, other, path)
    assert str(path) in str(refused.value)
    assert set(await dump(empty)) == {"schema"}
    assert stored(other) == set()
