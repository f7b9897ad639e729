"""`medley customize`: lay a user's own adapter over a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from server.cli.client import Client, Url, user_task_path
from server.cli.push import send


def customize(
    user: Annotated[str, typer.Argument(metavar="USER", help="User id, as requests say it.")],
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task id.")],
    path: Annotated[
        Path,
        typer.Argument(help="Folder of an adapter, as PEFT or AdapterHub saves it.", exists=True, file_okay=False),
    ],
    mode: Annotated[
        Literal["compose", "replace"],
        typer.Option(help="compose: over the task's adapter, whatever its version; replace: in its place."),
    ] = "compose",
    url: Url = None,
) -> None:
    """Lay a user's own adapter over a task, in place of what the user had there; their requests use it at once."""
    with Client(url) as client:
        made = send(client, "PUT", user_task_path(user, task), path, params={"mode": mode})
    print(
        f"{made['user']} on {made['task']}, {made['mode']}: {made['method']}, {made['parameters']:,} parameters, "
        f"{decimal(made['bytes'])}"
    )
