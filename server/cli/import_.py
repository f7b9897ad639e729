"""`medley import`: publish what `medley export` wrote."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from server.cli.archive import Archive, opened
from server.cli.client import Client, Json, Url, task_path
from server.cli.errors import CommandError

_GRANTED = ("public", "pinned")  # what only some keys may set
_DERIVED_FILE = "medley.json"  # what the server found out at the upload; it does so again


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Archive to read.", exists=True, dir_okay=False)],
    name: Annotated[
        str | None, typer.Option("--as", help="Task id here (default: the one of the export).", show_default=False)
    ] = None,
    url: Url = None,
) -> None:
    """Publish an exported task: its settings and all versions, which get numbers of their own. All files are checked
    before anything is sent; what a task of that name has already stays, and the same content is not made twice."""
    with opened(file) as archive, Client(url) as client:
        archive.check()
        task = archive.manifest["task"] if name is None else name
        numbers: dict[int, int] = {}
        for version in archive.manifest["versions"]:
            number = _publish(client, task, archive, version)
            numbers[version["version"]] = number
            print(f"{task}@{number}: version {version['version']} of the archive, {version['method']}")
        # only now, so that nothing changes for those who use the task if a version is refused
        settings: Json = archive.manifest["settings"]
        granted = [name for name in _GRANTED if settings.get(name)]
        # `public` is not sent where it is false either: only an admin's key may speak of it
        plain = {name: value for name, value in settings.items() if name != "public" and name not in granted}
        client.call("PUT", task_path(task), body=plain)
        _point(client, task, archive.manifest, numbers)
        _grant(client, task, granted)


def _grant(client: Client, task: str, granted: list[str]) -> None:
    """The settings that not every publisher may make: the task is there without them."""
    refused = {}
    for name in granted:
        try:
            client.call("PUT", task_path(task), body={name: True})
        except CommandError as error:
            refused[name] = error
    if refused:
        why = "; ".join(f"not {name}: {error}" for name, error in refused.items())
        raise CommandError(f"{task} is imported with all its versions and other settings, but {why}")


def _publish(client: Client, task: str, archive: Archive, version: Json) -> int:
    """Upload one version, active or not as before; its number. `CommandError` where the server makes another adapter of
    the same files."""
    number = version["version"]
    params: dict[str, str | int | bool] = {"activate": False}
    names = [file["name"] for file in version["files"]]
    with ExitStack() as stack:
        if _DERIVED_FILE in names:
            derived = json.load(stack.enter_context(archive.file(number, _DERIVED_FILE)))
            if "task_index" in derived:
                params["task_index"] = derived["task_index"]
            names.remove(_DERIVED_FILE)
        files = [(file_name, stack.enter_context(archive.file(number, file_name))) for file_name in names]
        made: Json = client.call("POST", task_path(task, "versions"), params=params, files=files)
    if made["digest"] != version["digest"]:
        raise CommandError(
            f"version {number} of the archive became {task}@{made['version']} with another digest: this server's base "
            f"reads its text in another way; look at it, or delete it with `medley delete {task} --version "
            f"{made['version']}`"
        )
    return int(made["version"])


def _point(client: Client, task: str, manifest: Json, numbers: dict[int, int]) -> None:
    """Active version and canary as in the archive."""
    active, canary = manifest["active"], manifest["canary"]
    if active is not None:
        client.call("PATCH", task_path(task), body={"active_version": numbers[active]})
        print(f"{task}@{numbers[active]} is active")
    if canary is not None:
        number = numbers[canary["version"]]
        body = {"canary": {"version": number, "percent": canary["percent"]}}
        client.call("PATCH", task_path(task), body=body)
        print(f"{task}@{number} answers {canary['percent']:g}% of the requests")
