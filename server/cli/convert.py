"""`medley convert`: pickled adapters as folders with safetensors, which the server opens"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    path: Annotated[
        Path, typer.Argument(help="An AdapterHub or PEFT folder with .bin files, or a T-Few .pt file.", exists=True)
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; absent: PATH's name with -safetensors, beside it.")
    ] = None,
) -> None:
    """Turn pickled weights into a folder that `medley push` takes. The server itself never opens pickles."""
    from server.cli.pickles import convert_file, convert_folder  # noqa: PLC0415 - torch, which others start without

    folder = output or path.resolve().with_name(f"{path.resolve().stem}-safetensors")
    if path.is_dir():
        convert_folder(path, folder)
    else:
        convert_file(path, folder)
    print(f"wrote {folder}; upload it with `medley push TASK {folder}`")
