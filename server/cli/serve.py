"""`medley serve`: one option per field of `server.settings.Settings`, whose name, default and description it takes.

Values reach `Settings` as they were typed: it converts and checks them, and reads the environment for what no
option gives. A value that it refuses is wrong usage.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from server.settings import Settings

_METAVARS = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "FOLDER"}


def serve(**given: str | bool | None) -> None:
    """Start a server and stay until SIGTERM or Ctrl-C.

    Every option has an environment variable: --max-seqs is MEDLEY_MAX_SEQS. An option wins over its variable.
    """
    settings = _settings({name: value for name, value in given.items() if value is not None})
    # Importing the HTTP server takes longer than a client command runs.
    from server.supervisor import run  # noqa: PLC0415

    raise typer.Exit(run(settings))


def _settings(given: dict[str, str | bool]) -> Settings:
    """Raises `typer.BadParameter`, which names the option or variable of the first wrong value."""
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0])
        source = f"--{name.replace('_', '-')}" if name in given else f"MEDLEY_{name.upper()}"
        raise typer.BadParameter(f"{wrong['msg']}, got {wrong['input']!r}", param_hint=source) from None


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The option of one setting; it is text, or a flag, absent unless given."""
    default = None if field.default is None else str(field.default)
    is_flag = field.annotation is bool
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        metavar=None if is_flag else _metavar(field.annotation),
        help=field.description if default is None else f"{field.description} (default: {default})",
        show_default=False,
    )
    kind: Any = bool | None if is_flag else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _metavar(annotation: Any) -> str:
    """What stands for the value in the help: `auto|cpu|cuda` for a choice, else the kind of value."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kinds = [kind for kind in (annotation, *get_args(annotation)) if kind in _METAVARS]
    if kinds:
        return _METAVARS[kinds[0]]
    inner = next(kind for kind in get_args(annotation) if kind is not type(None))  # Annotated in an Optional
    return _metavar(inner)


# Typer reads a command's options from its signature.
serve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_parameter(name, field) for name, field in Settings.model_fields.items()]
)
