"""The bundled demo: its base, and its tasks, which go into an empty index the way that uploads go.

The tasks stand in `demo/tasks.json`, their adapters in `demo/adapters`. A file in the data folder marks a publication
under way, so that the next start completes one that was cut off.
"""

from __future__ import annotations

import shlex
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from server.api import Caller, Services, publish_folder, put_settings
from server.api.schemas.tasks import TaskBody
from server.errors import StartupError

DEMO_BASE_ID = "medley-demo"  # what clients and the demo's adapters call the bundled base
_COMMANDS = 3


class DemoTask(msgspec.Struct, frozen=True):
    """One entry of `tasks.json`."""

    task: str
    description: str
    template: str | None
    defaults: dict[str, Any]  # sampling fields
    example: str  # an input
    adapter: str  # the folder's name in `demo/adapters`


def demo_base() -> Path:
    """The bundled base. Raises `StartupError` where this installation has none."""
    folder = _demo_folder() / "base"
    if not (folder / "config.json").is_file():
        raise StartupError("this installation has no demo base; name a base with --model")
    return folder


def demo_tasks() -> list[DemoTask]:
    """The tasks that come with the bundled base."""
    return msgspec.json.decode((_demo_folder() / "tasks.json").read_bytes(), type=list[DemoTask])


async def publish_demo(services: Services, marker: Path) -> None:
    """Publish the demo tasks if the index is empty, or if `marker` says that an earlier publication was cut off."""
    if not marker.exists():  # noqa: ASYNC240 - a look at a local folder
        if await services.index.count_tasks() > 0:
            return
        marker.touch()  # noqa: ASYNC240
    for entry in demo_tasks():
        settings = {"description": entry.description, "template": entry.template, "defaults": entry.defaults}
        await put_settings(services, Caller(), entry.task, TaskBody.model_validate(settings))
        await publish_folder(services, entry.task, _demo_folder() / "adapters" / entry.adapter, activate=True)
    marker.unlink()  # noqa: ASYNC240


def commands_to_try(url: str) -> list[str]:
    """A few commands for a shell, each of which shows one demo task at work."""
    medley = shlex.quote(sys.argv[0])  # as it was called for this server: it need not be on the PATH
    return [
        f"{medley} generate {entry.task} {shlex.quote(entry.example)} --url {url}" for entry in demo_tasks()[:_COMMANDS]
    ]


def _demo_folder() -> Path:
    return Path(str(resources.files("demo")))
