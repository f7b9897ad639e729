"""Publishing: acknowledged means whole and durable, dead before means invisible, and again means the same."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_store import FileRecord, LocalBlobs, NotFound, RedisIndex, StoreFull
from adapters_store.records import Version
from tests.store.samples import publish_text, write_adapter

pytestmark = pytest.mark.anyio


def content(blobs: LocalBlobs, version: Version) -> dict[str, bytes]:
    return {name: blobs.read(record.sha256) for name, record in version.files.items()}


def expected(folder: Path, text: str) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    write_adapter(folder, text)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_a_published_version_has_all_its_files_byte_for_byte(
    index: RedisIndex, blobs: LocalBlobs, tmp_path: Path
) -> None:
    version, is_new = await publish_text(index, blobs, "t", "a")
    assert is_new
    assert content(blobs, version) == expected(tmp_path / "expected", "a")
    assert (await index.get_version("t", 1)) == version
    assert (version.method, version.virtual_tokens, version.base_fingerprint) == ("prompt", 4, "base")


async def test_the_digest_is_of_the_adapters_two_files_alone(index: RedisIndex, blobs: LocalBlobs) -> None:
    version, _ = await publish_text(index, blobs, "t", "a", readme="one")
    again, is_new = await publish_text(index, blobs, "t", "a", readme="two")
    assert (again, is_new) == (version, False)
    other, _ = await publish_text(index, blobs, "t", "b", readme="one")
    assert other.digest != version.digest
    lines = [f"{name} {version.files[name].sha256}\n" for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert version.digest == hashlib.sha256("".join(lines).encode()).hexdigest()


async def test_publishes_at_once_are_all_whole(index: RedisIndex, blobs: LocalBlobs, tmp_path: Path) -> None:
    results = await asyncio.gather(*(publish_text(index, blobs, "t", f"{i % 5}") for i in range(15)))
    assert sorted(version.number for version, is_new in results if is_new) == [1, 2, 3, 4, 5]
    for i, (version, _) in enumerate(results):
        assert content(blobs, version) == expected(tmp_path / "expected", f"{i % 5}")


async def test_a_full_disk_shows_nothing_and_leaves_no_staged_file(index: RedisIndex, tmp_path: Path) -> None:
    class FullBlobs(LocalBlobs):
        """Its file system has room for one more file."""

        def put(self, path: Path) -> FileRecord:
            if path.name == "adapter_model.safetensors":
                raise StoreFull("no room")
            return super().put(path)

    blobs = FullBlobs(tmp_path / "blobs")
    with pytest.raises(StoreFull):
        await publish_text(index, blobs, "t", "a")
    assert await index.list_tasks(10) == ([], False)
    assert list((tmp_path / "blobs" / "staging").iterdir()) == []


async def test_a_publish_killed_at_any_line_is_invisible_or_whole_and_can_be_repeated(
    index: RedisIndex, blobs: LocalBlobs, tmp_path: Path, redis_url: str, namespace: str
) -> None:
    command = [sys.executable, "-m", "tests.store.publish_until_killed", redis_url, namespace, str(tmp_path / "blobs")]
    killed = await asyncio.to_thread(subprocess.run, command, stdout=subprocess.PIPE, check=True)
    steps = [int(line) for line in killed.stdout.split()]
    assert len(steps) > 60, "hardly any line was a place to die"
    visible = []
    for step in steps:
        name = f"step-{step}"
        try:
            versions = await index.list_versions(name)
        except NotFound:
            continue
        visible.append(step)
        assert (await index.get_task(name)).active == 1
        assert [content(blobs, version) for version in versions] == [expected(tmp_path / "expected", name)]
    assert 0 < len(visible) < len(steps) / 2
    assert blobs.sweep() > 0
    assert list((tmp_path / "blobs" / "staging").iterdir()) == []
    for step in steps:
        version, is_new = await publish_text(index, blobs, f"step-{step}", f"step-{step}")
        assert (version.number, is_new) == (1, step not in visible)
        assert content(blobs, version) == expected(tmp_path / "expected", f"step-{step}")
