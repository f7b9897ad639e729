"""`medley tune`: train an adapter with PEFT on JSON lines of {"input", "output"}, and upload it if asked.

The training is `server.tuning`'s; the options here are its settings, with its defaults.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from server.cli.client import Client, Url, task_path
from server.cli.push import announce, upload

if TYPE_CHECKING:
    from server.tuning.trainer import TuneReport

Modules = Annotated[list[str] | None, typer.Option(help="For ia3 and lora: modules to change; repeatable.")]
FeedForward = Annotated[
    list[str] | None, typer.Option(help="For ia3: those of them whose input is scaled; repeatable.")
]


def tune(
    task: Annotated[str, typer.Argument(help="Task id that the adapter is for.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA.jsonl", help='Lines of {"input", "output"}.', exists=True, dir_okay=False)
    ],
    method: Annotated[
        Literal["prompt", "prefix", "ia3", "lora", "ptuning"], typer.Option(help="How the adapter changes the base.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the base; absent: the bundled demo base.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the adapter; absent: TASK-METHOD here.")] = None,
    push: Annotated[bool, typer.Option("--push", help="Upload the adapter and make it the active version.")] = False,
    template: Annotated[
        str | None, typer.Option(help="Jinja over `input` that makes the prompt; --push gives it to the task too.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Validation lines; absent: a share of the data.", exists=True, dir_okay=False)
    ] = None,
    validation_share: Annotated[float, typer.Option(help="Share of the data that is held back.")] = 0.1,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 10,
    steps: Annotated[int | None, typer.Option(help="Steps, in place of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples of one step.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; absent: one that suits the method.")] = None,
    warmup_share: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.05,
    virtual_tokens: Annotated[
        int | None, typer.Option(help="For prompt, prefix, ptuning; absent: as many as --init has, else 20.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="For prompt and prefix: random, vocabulary, or text:SOME TEXT to start from.")
    ] = "random",
    projection: Annotated[bool, typer.Option("--projection", help="For prefix: train through a network.")] = False,
    rank: Annotated[int, typer.Option(help="For lora.")] = 8,
    alpha: Annotated[float, typer.Option(help="For lora: its update is scaled by alpha / rank.")] = 16.0,
    target_modules: Modules = None,
    feedforward_modules: FeedForward = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps; absent: once an epoch.")] = None,
    patience: Annotated[int, typer.Option(help="Validations without a better loss before training stops.")] = 5,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of an example, virtual ones counted; absent: what the base takes.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed and data give the same adapter.")] = 0,
    url: Url = None,
) -> None:
    """Train an adapter for a task on examples; the step with the best validation loss is kept."""
    folder = Path(f"{task}-{method}") if output is None else output
    settings: dict[str, Any] = {
        "method": method,
        "data": data,
        "output": folder,
        "template": template,
        "validation": validation,
        "validation_share": validation_share,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_share": warmup_share,
        "virtual_tokens": virtual_tokens,
        "init": init,
        "projection": projection,
        "rank": rank,
        "alpha": alpha,
        "target_modules": tuple(target_modules) if target_modules else None,
        "feedforward_modules": tuple(feedforward_modules or ()),
        "validate_every": validate_every,
        "patience": patience,
        "max_length": max_length,
        "seed": seed,
    }
    report = _train(model, settings)
    print(
        f"{folder}: {report.parameters:,} parameters, validation loss {report.initial_loss:.4f} → "
        f"{report.best_loss:.4f} at step {report.best_step} of {report.steps}"
        + (", stopped early" if report.stopped_early else "")
    )
    if push:
        _publish(task, folder, template, url)


def _train(model: str | None, settings: dict[str, Any]) -> TuneReport:
    from server.supervisor.demo_tasks import DEMO_BASE_ID, demo_base  # noqa: PLC0415
    from server.tuning import ProgressBar, TuneSettings, trainer  # noqa: PLC0415 - torch, which others start without

    base_name = DEMO_BASE_ID if model is None else None
    base = str(demo_base()) if model is None else model
    console = Console(stderr=True)
    with ProgressBar(console) if console.is_terminal else nullcontext(_ValidationLines()) as progress:
        return trainer.tune(TuneSettings(model=base, base_name=base_name, **settings), progress)


class _ValidationLines:
    """What a log gets in place of a bar: a line on stderr for each validation."""

    def started(self, steps: int) -> None:
        pass

    def stepped(self, step: int, loss: float) -> None:
        pass

    def validated(self, step: int, loss: float, best: bool) -> None:
        print(f"step {step}: validation loss {loss:.4f}{' (best so far)' if best else ''}", file=sys.stderr)


def _publish(task: str, folder: Path, template: str | None, url: str | None) -> None:
    """Upload, give the task the template that the adapter was trained with, then switch: in this order the task never
    answers with one of the two alone where it is new."""
    with Client(url) as client:
        version = upload(client, task, folder, activate=False)
        client.call("PUT", task_path(task), body={"template": template})
        client.call("PATCH", task_path(task), body={"active_version": version["version"]})
    announce({**version, "active": True})
