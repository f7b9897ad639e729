"""`medley methods`: the methods that adapters may have on a server"""

from __future__ import annotations

import json

from server.cli.client import Client, Json, Url
from server.cli.table import print_table
from server.cli.tasks import AsJson


def methods(as_json: AsJson = False, url: Url = None) -> None:
    """List the methods that adapters may have, with the checkpoints that are read and what they cost."""
    with Client(url) as client:
        listed: list[Json] = client.call("GET", "/v1/methods")["data"]
    if as_json:
        print(json.dumps(listed, indent=2))
        return
    rows = [
        [
            method["method"],
            method["mechanism"],
            ", ".join(method["formats"]),
            method["parameters_per_layer"],
            method["cost"],
        ]
        for method in listed
    ]
    print_table(["method", "mechanism", "checkpoints", "parameters per layer", "cost"], rows)
