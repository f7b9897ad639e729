"""A task's history for a person: `medley show TASK --history`."""

from __future__ import annotations

import json

from server.cli.client import Client, Json, Url, task_path
from server.cli.table import ago, print_table

_SHOWN = 100  # changes


def show_history(task: str, *, as_json: bool, url: Url) -> None:
    """Print the newest changes of a task, which may have been deleted."""
    with Client(url) as client:
        page: Json = client.call("GET", task_path(task, "history"), params={"limit": _SHOWN})
    if as_json:
        print(json.dumps(page["data"], indent=2))
        return
    rows = [
        [entry["id"], ago(entry["time"]), entry["action"], entry["actor"], json.dumps(entry["detail"])]
        for entry in page["data"]
    ]
    print_table(["change", "when", "what", "key", "detail"], rows)
