"""Versions and files to publish, all different by their `text`; and bounded waiting."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from adapters_store import (
    LocalBlobs,
    NewVersion,
    NewVersionFacts,
    RedisIndex,
    Version,
    customize_files,
    publish_files,
)
from adapters_store.identity import adapter_digest
from adapters_store.records import BY_NOBODY, Change, FileRecord, Mode, NewCustomization

FACTS = NewVersionFacts(method="prompt", parameters=64, bytes=300, virtual_tokens=4, base_fingerprint="base")


def new_version(text: str, base: str = "base") -> NewVersion:
    files = {"adapter_config.json": FileRecord("c" * 64, 10)}
    return NewVersion(digest=text, method="lora", parameters=1, bytes=10, rank=2, files=files, base_fingerprint=base)


def new_customization(text: str, mode: Mode = "compose") -> NewCustomization:
    names = ("adapter_config.json", "adapter_model.safetensors", "medley.json", "README.md")
    files = {name: FileRecord(hashlib.sha256(f"{name} {text}".encode()).hexdigest(), 10_000) for name in names}
    return NewCustomization(
        mode=mode,
        digest=adapter_digest(files),
        method="prompt_tuning",
        parameters=1280,
        bytes=30_000,
        virtual_tokens=20,
        files=files,
        base_fingerprint=hashlib.sha256(b"base").hexdigest(),
    )


def write_adapter(folder: Path, text: str, readme: str = "about") -> None:
    (folder / "adapter_config.json").write_text(f'{{"text": "{text}"}}')
    (folder / "adapter_model.safetensors").write_bytes(text.encode() * 100)
    (folder / "README.md").write_text(readme)


async def publish_text(
    index: RedisIndex, blobs: LocalBlobs, task: str, text: str, *, readme: str = "about"
) -> tuple[Version, bool]:
    with blobs.staging() as folder:
        write_adapter(folder, text, readme)
        return await publish_files(index, blobs, task, folder, FACTS, activate=True)


async def customize_text(
    index: RedisIndex, blobs: LocalBlobs, user: str, task: str, text: str, change: Change = BY_NOBODY
) -> set[str]:
    """The blobs of what `user` now has over `task`."""
    with blobs.staging() as folder:
        write_adapter(folder, text)
        made = await customize_files(index, blobs, user, task, folder, FACTS, mode="compose", change=change)
    return {file.sha256 for file in made.files.values()}


def put(blobs: LocalBlobs, content: bytes) -> str:
    """The name of a blob of this content, which is there now."""
    with blobs.staging() as folder:
        (folder / "file").write_bytes(content)
        return blobs.put(folder / "file").sha256


def stored(blobs: LocalBlobs) -> set[str]:
    """All blobs there are."""
    return {blob.sha256 for blob in blobs.list()}


async def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Return once `holds`; the bound only ends a broken test."""
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up, "it never came to hold"
        await asyncio.sleep(0.01)
