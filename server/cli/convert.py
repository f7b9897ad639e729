"""`medley convert`: adapters in forms that the server does not open, as folders that it does"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.errors import CommandError
from server.cli.table import print_table


def convert(
    path: Annotated[
        Path,
        typer.Argument(
            help="An AdapterHub or PEFT folder with .bin files, AdapterHub's folders of a fusion and its adapters, "
            "or a T-Few .pt file.",
            exists=True,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; absent: PATH's name with -safetensors or -lora, beside it.")
    ] = None,
    to_lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            min=1,
            help="Make a LoRA of this rank out of a PEFT adapter of another method that changes weights.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="BASE", help="With --to-lora: the base's folder or name, as it is served.")
    ] = None,
    max_error: Annotated[
        float,
        typer.Option(min=0, help="With --to-lora: the largest error that a module may have, relative to its change."),
    ] = 0.01,
) -> None:
    """Turn an adapter into a folder that `medley push` takes. The server itself never opens pickles."""
    folder = output or path.resolve().with_name(f"{path.resolve().stem}-{'lora' if to_lora else 'safetensors'}")
    # What follows loads torch, which other commands start without: each imports its own.
    if to_lora is not None:
        if model is None or not path.is_dir():
            raise typer.BadParameter("it takes a PEFT folder, and the base as --model", param_hint="--to-lora")
        _convert_to_lora(path, model, folder, to_lora, max_error)
    elif model is not None:
        raise typer.BadParameter("only --to-lora needs the base", param_hint="--model")
    elif path.is_dir():
        _convert_folder(path, folder)
    else:
        from server.cli.pickles import convert_file  # noqa: PLC0415 - torch, as below

        convert_file(path, folder)
    print(f"wrote {folder}; upload it with `medley push TASK {folder}`")


def _convert_folder(path: Path, folder: Path) -> None:
    from server.cli.fused import convert_fusion, is_fusion  # noqa: PLC0415
    from server.cli.pickles import convert_folder  # noqa: PLC0415

    if not is_fusion(path):
        convert_folder(path, folder)
        return
    for head in convert_fusion(path, folder):
        print(f"left out {head}: the head of that adapter alone, not the fusion's")


def _convert_to_lora(path: Path, model: str, folder: Path, rank: int, max_error: float) -> None:
    from server.cli.to_lora import convert_to_lora, write  # noqa: PLC0415

    converted = convert_to_lora(path, model, rank)
    worst: dict[str, tuple[float, str]] = {}
    for name, error in converted.errors.items():
        kind = name.rsplit(".", 1)[-1]
        worst[kind] = max(worst.get(kind, (0.0, name)), (error, name))
    rows: list[list[object]] = [[kind, f"{error:.2e}", name] for kind, (error, name) in worst.items()]
    print_table(["modules", "worst relative error", "at"], rows)
    error, name = max(worst.values())
    if not error <= max_error:  # also where it is not a number
        raise CommandError(
            f"a LoRA of rank {rank} is off by {error:.2e} of the adapter's change at {name}, more than {max_error:g}; "
            "nothing was written: ask for a higher rank, or allow it with --max-error"
        )
    write(converted, folder)
