"""A task's history for a person: `medley show TASK --history`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

from server.cli.client import Client, Json, Url, task_path
from server.cli.table import print_table

_PAGE = 100  # changes


def show_history(task: str, *, as_json: bool, url: Url) -> None:
    """Print all changes that are kept of a task, which may have been deleted, newest first."""
    with Client(url) as client:
        entries = list(_entries(client, task))
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    rows = [
        [
            entry["id"],
            datetime.fromtimestamp(entry["time"], UTC).isoformat(" ", "seconds"),
            entry["action"],
            entry["actor"],
            entry["request_id"],
            json.dumps(entry["detail"]),
        ]
        for entry in entries
    ]
    print_table(["change", "time", "what", "key", "request", "detail"], rows)


def _entries(client: Client, task: str) -> Iterator[Json]:
    params: dict[str, str | int | bool] = {"limit": _PAGE}
    has_more = True
    while has_more:
        page: Json = client.call("GET", task_path(task, "history"), params=params)
        yield from page["data"]
        has_more = page["has_more"]
        if has_more:
            params["before"] = page["data"][-1]["id"]
