"""The commands that say which version answers: `activate`, `rollback`, `canary`."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.client import Client, Json, Url, task_path

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="Task id.")]
_OFF = "off"


def activate(
    task: TaskName,
    version: Annotated[int, typer.Argument(min=1, help="Version to answer with from now on.")],
    url: Url = None,
) -> None:
    """Switch a task to a version; requests under way end on the one that they began with."""
    with Client(url) as client:
        client.call("PATCH", task_path(task), body={"active_version": version})
    print(f"{task}@{version} is active")


def rollback(task: TaskName, url: Url = None) -> None:
    """Switch a task back to the version that was active before."""
    with Client(url) as client:
        changed: Json = client.call("POST", task_path(task, "rollback"))
    print(f"{task}@{changed['active']} is active")


def canary(
    task: TaskName,
    version: Annotated[str, typer.Argument(metavar="VERSION|off", help="Version to try; off: none any longer.")],
    percent: Annotated[
        float | None, typer.Argument(metavar="PERCENT", min=0, max=100, help="Of the requests that get it.")
    ] = None,
    url: Url = None,
) -> None:
    """Let a version answer a share of a task's requests: the same users always."""
    if version == _OFF:
        if percent is not None:
            raise typer.BadParameter("`off` takes no percent", param_hint="PERCENT")
        with Client(url) as client:
            client.call("PATCH", task_path(task), body={"canary": None})
        print(f"{task} has no canary")
        return
    if not (version.isascii() and version.isdecimal()):
        raise typer.BadParameter(f"{version!r} is neither a version's number nor `off`", param_hint="VERSION")
    if percent is None:
        raise typer.BadParameter("say how many percent of the requests get it", param_hint="PERCENT")
    with Client(url) as client:
        client.call("PATCH", task_path(task), body={"canary": {"version": int(version), "percent": percent}})
    print(f"{task}@{version} answers {percent:g}% of the requests")
