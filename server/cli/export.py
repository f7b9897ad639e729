"""`medley export`: write a task with all its versions and settings to one file."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from server.cli.archive import SETTINGS, add, add_manifest, member_of
from server.cli.client import Client, Json, Url, task_path
from server.cli.errors import CommandError

_IN_MEMORY = 16_000_000  # bytes of a file that need no room on disk until they are in the archive


def export(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task id.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Archive to write, a tar.", dir_okay=False)],
    url: Url = None,
) -> None:
    """Write a task to one file: its settings and all versions, which `medley import` publishes elsewhere. Users'
    customizations are not in it."""
    unfinished = file.with_name(f"{file.name}.part")
    try:
        with Client(url) as client, tarfile.open(unfinished, "w") as archive:
            manifest = _write(client, task, archive)
        os.replace(unfinished, file)
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"{file}: {task}, {len(manifest['versions'])} versions, {decimal(file.stat().st_size)}")


def _write(client: Client, task: str, archive: tarfile.TarFile) -> Json:
    """All versions and, last, the manifest: what is cut off has none."""
    record: Json = client.call("GET", task_path(task))
    versions = []
    for version in record["versions"]:
        for file in version["files"]:
            _copy(client, task, version["version"], file, archive)
        kept = ("version", "digest", "method", "files")
        versions.append({name: version[name] for name in kept})
    manifest = {
        "task": record["task"],
        "settings": {name: record[name] for name in SETTINGS},
        "versions": versions,
        "active": record["active"],
        "canary": record["canary"],
    }
    add_manifest(archive, manifest)
    return manifest


def _copy(client: Client, task: str, version: int, file: Json, archive: tarfile.TarFile) -> None:
    """One file, from the server into the archive; `CommandError` where it is another than the server's record says."""
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as content:
        client.download(task_path(task, "versions", str(version), "files", file["name"]), content)
        content.seek(0)
        if hashlib.file_digest(content, "sha256").hexdigest() != file["sha256"]:
            raise CommandError(f"{file['name']} of {task}@{version} did not come whole; export the task again")
        content.seek(0)
        add(archive, member_of(version, file["name"]), content, file["bytes"])
