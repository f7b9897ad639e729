"""`medley push`: upload an adapter's folder as a new version of a task."""

from __future__ import annotations

import json
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
_WEIGHTS = ("adapter_model.safetensors", "adapter.safetensors")  # PEFT's, AdapterHub's
_PICKLED = ("adapter_model.bin", "pytorch_adapter.bin", "pytorch_model_head.bin")
_OPTIONAL = (
    "head_config.json",  # AdapterHub's prediction head, with the next
    "model_head.safetensors",
    "README.md",  # PEFT writes one; the server keeps it
)
_NO_WEIGHTS = "text_prompt"  # the method of ours that has none
_PROGRESS_FROM_BYTES = 8_000_000  # a smaller upload is over before a bar could be read


def push(
    task: Annotated[str, typer.Argument(help="Task id; a new one is created.")],
    path: Annotated[
        Path,
        typer.Argument(help="Folder of an adapter, as PEFT or AdapterHub saves it.", exists=True, file_okay=False),
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
            for one in _versions(version):
                client.call("PUT", task_path(one["task"]), body={"description": description})
    for one in _versions(version):
        announce(one)


def upload(client: Client, task: str, folder: Path, *, activate: bool) -> Json:
    """Send the adapter in `folder`; the server's record of the version. Its warnings go to stderr.

    Raises `CommandError` as `send` does.
    """
    return send(client, "POST", task_path(task, "versions"), folder, params={"activate": activate})


def send(client: Client, method: str, path: str, folder: Path, *, params: dict[str, str | int | bool]) -> Json:
    """Send the adapter in `folder`; the server's answer. Its warnings go to stderr.

    Raises `CommandError` for a folder without the files of an adapter, before anything is sent, and for what the
    server refuses.
    """
    paths = _adapter_files(folder)
    with ExitStack() as stack:
        progress = stack.enter_context(_progress(sum(path.stat().st_size for path in paths)))
        files = [(path.name, stack.enter_context(progress.open(path, "rb", description=path.name))) for path in paths]
        answer: Json = client.call(method, path, params=params, files=files)
    for warning in answer.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    return answer


def _versions(version: Json) -> list[Json]:
    """What an upload has made: a version, or one of each task that its checkpoint holds."""
    versions: list[Json] = version.get("tasks", [version])
    return versions


def announce(version: Json) -> None:
    """One line on stdout for a version that was uploaded."""
    state = "active" if version["active"] else "not active"
    print(
        f"{version['task']}@{version['version']}, {state}: {version['method']}, "
        f"{version['parameters']:,} parameters, {decimal(version['bytes'])}"
    )


def _adapter_files(folder: Path) -> list[Path]:
    """The files to send: an adapter's config and weights, and those beside them that the server takes."""
    if not (folder / _CONFIG).is_file():
        raise CommandError(f"{folder} has no {_CONFIG}; give the folder that PEFT or AdapterHub wrote")
    weights = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    optional = [folder / name for name in _OPTIONAL if (folder / name).is_file()]
    sent = [folder / _CONFIG, *weights, *optional]
    for name in _PICKLED:
        if (folder / name).is_file() and not _has_safetensors_of(name, sent):
            raise CommandError(
                f"{folder} has pickled weights ({name}), which are never opened; save the adapter again as safetensors "
                f"(PEFT: `safe_serialization=True`), or convert it with `medley convert {folder}`"
            )
    if not weights and not _is_without_weights(folder / _CONFIG):
        raise CommandError(f"{folder} has no {' or '.join(_WEIGHTS)}; give the folder that PEFT or AdapterHub wrote")
    return sent


def _has_safetensors_of(pickled: str, sent: list[Path]) -> bool:
    """Whether the same weights are among what is sent."""
    return f"{pickled.removeprefix('pytorch_').removesuffix('.bin')}.safetensors" in {path.name for path in sent}


def _is_without_weights(config: Path) -> bool:
    try:
        content = json.loads(config.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("medley_method") == _NO_WEIGHTS


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
