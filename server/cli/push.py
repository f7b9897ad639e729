"""`medley push`: upload a PEFT folder as a new version of a task."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from server.cli.client import Client, Json, Url, task_path
from server.cli.errors import CommandError

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_OPTIONAL = ("README.md",)  # PEFT writes one; the server keeps it
_PROGRESS_FROM_BYTES = 8_000_000  # a smaller upload is over before a bar could be read


def push(
    task: Annotated[str, typer.Argument(help="Task id; a new one is created.")],
    path: Annotated[
        Path, typer.Argument(help="PEFT folder, as `save_pretrained` writes it.", exists=True, file_okay=False)
    ],
    activate: Annotated[
        bool, typer.Option("--activate/--no-activate", help="Answer requests with it from now on.")
    ] = True,
    description: Annotated[str | None, typer.Option(help="What the task does, for the listing.")] = None,
    url: Url = None,
) -> None:
    """Upload an adapter as a new version of a task; it is served at once, without a restart."""
    with Client(url) as client:
        version = upload(client, task, path, activate=activate)
        if description is not None:
            client.call("PUT", task_path(task), body={"description": description})
    announce(version)


def upload(client: Client, task: str, folder: Path, *, activate: bool) -> Json:
    """Send the adapter in `folder`; the server's record of the version. Its warnings go to stderr.

    Raises `CommandError` for a folder without the two files of an adapter, before anything is sent, and for
    what the server refuses.
    """
    paths = _adapter_files(folder)
    with ExitStack() as stack:
        progress = stack.enter_context(_progress(sum(path.stat().st_size for path in paths)))
        files = [(path.name, stack.enter_context(progress.open(path, "rb", description=path.name))) for path in paths]
        version: Json = client.call("POST", task_path(task, "versions"), params={"activate": activate}, files=files)
    for warning in version.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    return version


def announce(version: Json) -> None:
    """One line on stdout for a version that was uploaded."""
    state = "active" if version["active"] else "not active"
    print(
        f"{version['task']}@{version['version']}, {state}: {version['method']}, "
        f"{version['parameters']:,} parameters, {decimal(version['bytes'])}"
    )


def _adapter_files(folder: Path) -> list[Path]:
    """The files to send: the two of an adapter, and those beside them that the server keeps."""
    if not (folder / _CONFIG).is_file():
        raise CommandError(f"{folder} has no {_CONFIG}; give the folder that PEFT's `save_pretrained` wrote")
    if not (folder / _WEIGHTS).is_file():
        if (folder / _PICKLED).is_file():
            raise CommandError(
                f"{folder} has pickled weights ({_PICKLED}), which are never opened; "
                f"save the adapter again with `safe_serialization=True` to get {_WEIGHTS}"
            )
        raise CommandError(f"{folder} has no {_WEIGHTS}; give the folder that PEFT's `save_pretrained` wrote")
    optional = [folder / name for name in _OPTIONAL if (folder / name).is_file()]
    return [folder / _CONFIG, folder / _WEIGHTS, *optional]


def _progress(total_bytes: int) -> Progress:
    """A bar on the terminal for an upload that takes a while; else one that shows nothing."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=total_bytes < _PROGRESS_FROM_BYTES or not console.is_terminal,
    )
