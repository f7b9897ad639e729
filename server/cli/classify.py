"""`medley classify`: the labels of an input, best first, or its number."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.client import Client, Url, task_path
from server.cli.generate import stdin_text
from server.cli.table import print_table


def classify(
    task: Annotated[str, typer.Argument(help="Task id; task@N asks for one version.")],
    text: Annotated[str | None, typer.Argument(help="Input of the task; absent: stdin.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose customization of the task to use.")] = None,
    url: Url = None,
) -> None:
    """Classify with a task that has a classification head: each label's probability, or a number."""
    body = {"input": stdin_text() if text is None else text}
    if user is not None:
        body["user"] = user
    with Client(url) as client:
        answer = client.call("POST", task_path(task, "classify"), body=body)
    if "value" in answer:
        print(answer["value"])
    else:
        rows = [(found["label"], f"{found['probability']:.4f}") for found in answer["labels"]]
        print_table(("label", "probability"), rows)
