"""The console entry point: the table of commands, and the one place where a failure becomes an exit status."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer

from server.cli import keys
from server.cli.backup import backup, restore
from server.cli.classify import classify
from server.cli.convert import convert
from server.cli.customize import customize
from server.cli.evaluate import evaluate
from server.cli.export import export
from server.cli.gc import gc
from server.cli.generate import generate
from server.cli.import_ import import_
from server.cli.life_cycle import activate, canary, rollback
from server.cli.methods import methods
from server.cli.push import push
from server.cli.serve import serve
from server.cli.tasks import delete, show, tasks
from server.cli.tune import tune
from server.errors import MedleyError

app = typer.Typer(
    name="medley",
    help="Serve many tasks from one frozen language model, and manage them while it serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and plain usage errors, the same in a terminal and in a log
)
for command in (
    serve,
    push,
    tasks,
    show,
    activate,
    rollback,
    canary,
    delete,
    customize,
    export,
    generate,
    classify,
    evaluate,
    tune,
    methods,
    convert,
    gc,
    backup,
    restore,
):
    app.command()(command)
app.command("import")(import_)
app.add_typer(keys.app, name="keys")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medley {importlib.metadata.version('medley')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `medley` itself; a callback keeps the command names mandatory."""


def main() -> None:
    """Run the command line; a `MedleyError` is one line on stderr and exit status 1."""
    try:
        app()
    except MedleyError as error:
        print(f"medley: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(1)
