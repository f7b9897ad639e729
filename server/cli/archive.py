"""The file that `medley export` writes and `medley import` reads: one tar with all versions of a task.

    manifest.json             `{"medley_export": 1, "task", "settings", "versions", "active", "canary"}`
    versions/N/NAME           each version's files as uploaded, byte for byte

`versions` are in order of their numbers, each `{"version", "digest", "method", "files": [{"name", "sha256",
"bytes"}]}`. The tar is not compressed: weights hardly are compressible. Nothing is ever unpacked to a path that the
archive names.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from server.cli.client import Json
from server.cli.errors import CommandError

MANIFEST = "manifest.json"
FORMAT = 1
SETTINGS = ("description", "template", "defaults", "labels", "public", "pinned", "customization")
"""What a task's settings are called, in an answer and in a `PUT` alike."""


class _File(msgspec.Struct):
    name: str
    sha256: str
    bytes: int


class _Version(msgspec.Struct):
    version: int
    digest: str
    method: str
    files: list[_File]


class _Canary(msgspec.Struct):
    version: int
    percent: float


class _Manifest(msgspec.Struct):
    """What is read of a manifest; whether the settings can be a task's is the server's to say."""

    task: str
    settings: Json
    versions: list[_Version]
    active: int | None
    canary: _Canary | None


def member_of(version: int, name: str) -> str:
    """Where a version's file stands in the archive."""
    return f"versions/{version}/{name}"


def add(archive: tarfile.TarFile, name: str, content: IO[bytes], size: int) -> None:
    """Append a member that everybody may read."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    archive.addfile(entry, content)


def add_manifest(archive: tarfile.TarFile, manifest: Json) -> None:
    """Append the manifest."""
    content = json.dumps({"medley_export": FORMAT, **manifest}, indent=2).encode()
    add(archive, MANIFEST, io.BytesIO(content), len(content))


class Archive:
    """An archive that is read. Use `opened`."""

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self._path = path
        self._tar = tar
        self.manifest = self._read_manifest()

    def file(self, version: int, name: str) -> IO[bytes]:
        """One file of a version; `CommandError` where it is missing."""
        member = member_of(version, name)
        try:
            content = self._tar.extractfile(member)
        except KeyError:
            content = None
        if content is None:
            raise CommandError(f"{self._path} is damaged: it has no {member}; export the task again")
        return content

    def check(self) -> None:
        """Compare every file with its hash in the manifest; `CommandError` names the first that is another."""
        for version in self.manifest["versions"]:
            for file in version["files"]:
                with self.file(version["version"], file["name"]) as content:
                    found = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]  # IO[bytes] reads
                if found != file["sha256"]:
                    member = member_of(version["version"], file["name"])
                    raise CommandError(f"{self._path} is damaged: {member} was altered; export the task again")

    def _read_manifest(self) -> Json:
        try:
            member = self._tar.extractfile(MANIFEST)
            manifest = None if member is None else json.load(member)
        except (KeyError, ValueError):
            manifest = None
        if not isinstance(manifest, dict) or "medley_export" not in manifest:
            raise CommandError(f"{self._path} is no archive of `medley export`: it has no {MANIFEST} of one")
        if manifest["medley_export"] != FORMAT:
            form = manifest["medley_export"]
            raise CommandError(f"{self._path} has format {form}, this command reads {FORMAT}; use a newer medley")
        self._check_fields(manifest)
        return manifest

    def _check_fields(self, manifest: Json) -> None:
        """`CommandError` names the first field that is missing or wrong."""
        try:
            read = msgspec.convert(manifest, _Manifest)
        except msgspec.ValidationError as error:
            message = f"{self._path} is damaged: in its {MANIFEST}: {error}; export the task again"
            raise CommandError(message) from None
        pointers = {"active": read.active, "canary": None if read.canary is None else read.canary.version}
        for field, number in pointers.items():
            if number is not None and number not in {version.version for version in read.versions}:
                message = f"{self._path} is damaged: in its {MANIFEST}: `{field}` names version {number}"
                raise CommandError(f"{message}, which it has not; export the task again")


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """An archive to read from; `CommandError` for a file that is none."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield Archive(path, tar)
    except (tarfile.TarError, EOFError) as error:
        raise CommandError(f"{path} is no archive of `medley export`, or is cut off: {error}") from None
