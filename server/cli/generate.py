"""`medley generate`: one answer of a task, written to stdout as it comes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from server.cli.client import Client, Url, task_path
from server.cli.errors import CommandError


def generate(
    task: Annotated[str, typer.Argument(help="Task id; task@N asks for one version.")],
    text: Annotated[str | None, typer.Argument(help="Input of the task; absent: stdin.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose customization of the task to use.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the answer.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Least tokens before the answer may end.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, relative to the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Over 1: repeat less.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Over 0: no token twice.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Over 0: fewer repeated tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")] = None,
    url: Url = None,
) -> None:
    """Generate with a task, streaming to stdout. Options that are not given come from the task's defaults."""
    sampling: dict[str, Any] = {
        "user": user,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": stop or None,
    }
    body = {"input": stdin_text() if text is None else text, "stream": True}
    body |= {name: value for name, value in sampling.items() if value is not None}
    with Client(url) as client:
        for event in client.stream(task_path(task, "generate"), body):
            sys.stdout.write(event.get("text", ""))
            sys.stdout.flush()
    sys.stdout.write("\n")


def stdin_text() -> str:
    """All of stdin, without the line end that `echo` and editors add, as a shell's `$(…)` takes it."""
    if sys.stdin.isatty():
        print("reading the input from the terminal; Ctrl-D ends it", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise CommandError(f"stdin is not UTF-8 text ({error.reason} at byte {error.start})") from None
