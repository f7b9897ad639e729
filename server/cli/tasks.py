"""The commands on tasks: `tasks`, `show`, `delete`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.filesize import decimal

from server.cli.client import Client, Json, Url, task_path
from server.cli.errors import CommandError
from server.cli.history import show_history
from server.cli.table import ago, print_table

_PAGE = 500

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="Task id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's JSON, for scripts.")]


def tasks(as_json: AsJson = False, url: Url = None) -> None:
    """List all tasks with their active versions."""
    with Client(url) as client:
        listed = list(_all_tasks(client))
    if as_json:
        print(json.dumps(listed, indent=2))
        return
    rows = [
        [
            task["task"],
            task["active"],
            ", ".join(task["methods"]),
            decimal(task["bytes"]),
            ago(task["last_used"]),
            task["description"],
        ]
        for task in listed
    ]
    print_table(["task", "active", "method", "size", "last used", "description"], rows)


def show(
    task: TaskName,
    neighbours: Annotated[
        bool, typer.Option("--neighbours", help="What the active version's virtual tokens are near to, instead.")
    ] = False,
    history: Annotated[bool, typer.Option("--history", help="Who changed the task, newest first, instead.")] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Show a task's settings and versions."""
    if neighbours:
        _show_neighbours(task, as_json, url)
        return
    if history:
        show_history(task, as_json=as_json, url=url)
        return
    with Client(url) as client:
        record: Json = client.call("GET", task_path(task))
    if as_json:
        print(json.dumps(record, indent=2))
        return
    settings = [
        ["description", record["description"]],
        ["template", record["template"]],
        ["defaults", json.dumps(record["defaults"])],
        ["labels", json.dumps(record["labels"])],
        ["active", record["active"]],
        ["canary", _canary(record["canary"])],
        ["previous", record["previous"]],
        ["pinned", "yes" if record["pinned"] else "no"],
        ["public", "yes" if record["public"] else "no"],
        ["for its users", _limits(record["customization"])],
        ["revision", record["revision"]],
        ["last used", ago(record["last_used"])],
    ]
    versions = [
        [
            version["version"],
            _state(version, record["canary"]),
            version["method"],
            f"{version['parameters']:,}",
            decimal(version["bytes"]),
            ago(version["created"]),
        ]
        for version in record["versions"]
    ]
    print_table(["task", record["task"]], settings)
    print()
    print_table(["version", "state", "method", "parameters", "size", "created"], versions)


def delete(
    task: TaskName,
    version: Annotated[int | None, typer.Option(min=1, help="Delete this version alone.")] = None,
    url: Url = None,
) -> None:
    """Delete a task with all its versions, or one version that is not active."""
    path = task_path(task) if version is None else task_path(task, "versions", str(version))
    with Client(url) as client:
        client.call("DELETE", path)
    print(f"deleted {task}" if version is None else f"deleted {task}@{version}")


def _show_neighbours(task: str, as_json: bool, url: str | None) -> None:
    """Of a soft prompt: each virtual token's nearest tokens with their similarity; of a prefix: norms per layer."""
    with Client(url) as client:
        active = client.call("GET", task_path(task))["active"]
        if active is None:
            raise CommandError(f"no version of '{task}' is active; choose one with `medley activate {task} VERSION`")
        found: Json = client.call("GET", task_path(task, "versions", str(active), "neighbours"))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    if found["layers"]:
        rows = [
            [layer, _range_of(norms["key_norms"]), _range_of(norms["value_norms"])]
            for layer, norms in enumerate(found["layers"])
        ]
        print_table(["layer", "key norms", "value norms"], rows)
        return
    rows = [
        [at, f"{token['norm']:.3f}", "  ".join(_neighbour(near) for near in token["neighbours"])]
        for at, token in enumerate(found["virtual_tokens"])
    ]
    print_table(["virtual token", "norm", "nearest tokens (cosine)"], rows)


def _neighbour(near: Json) -> str:
    name = near["token_id"] if near["token"] is None else json.dumps(near["token"], ensure_ascii=False)
    return f"{name} {near['similarity']:.2f}"


def _range_of(norms: list[float]) -> str:
    """Least, mean and greatest."""
    return f"{min(norms):.3f} … {sum(norms) / len(norms):.3f} … {max(norms):.3f}"


def _all_tasks(client: Client) -> Iterator[Json]:
    params: dict[str, str | int | bool] = {"limit": _PAGE}
    has_more = True
    while has_more:
        page: Json = client.call("GET", "/v1/tasks", params=params)
        yield from page["data"]
        has_more = page["has_more"]
        if page["data"]:
            params["after"] = page["data"][-1]["task"]


def _state(version: Json, canary: Json | None) -> str | None:
    if not version["servable"]:
        return "made for another base"
    if canary is not None and canary["version"] == version["version"]:
        return "canary"
    return "active" if version["active"] else None


def _canary(canary: Json | None) -> str | None:
    return None if canary is None else f"{canary['version']}, {canary['percent']:g}% of the requests"


def _limits(limits: Json | None) -> str:
    """What users may lay over the task."""
    given = {} if limits is None else {name: limit for name, limit in limits.items() if limit is not None}
    return json.dumps(given) if given else "anything"
