"""From AdapterHub's folders of a fusion and its adapters to the one folder that the server takes

The library writes a fusion apart from what it fuses: `save_adapter_setup` a folder of each under one,
`save_adapter_fusion` and `save_adapter` wherever they are told. Under `PATH`, or in it, are looked for:

    adapter_fusion_config.json, model_adapter_fusion.safetensors (or pytorch_model_adapter_fusion.bin)
    for each of its `adapter_names` a folder whose adapter_config.json has that `name`, with the adapter's weights

The result is `adapter_config.json`, which is the fusion's with the adapters' own configs beside (`adapters`), and
`adapter.safetensors` with the tensors of all. A prediction head beside the fusion's files comes too; one beside an
adapter's files was that adapter's own, and is left out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.cli.errors import CommandError
from server.cli.pickles import make_folder, pickled_tensors

_FUSION_CONFIG = "adapter_fusion_config.json"
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
_HEAD_CONFIG = "head_config.json"
_HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")


def is_fusion(source: Path) -> bool:
    """Whether a fusion's config is in the folder or in one of its folders."""
    return bool(_folders_with(source, _FUSION_CONFIG))


def convert_fusion(source: Path, output: Path) -> list[Path]:
    """Write the one folder; returns the files of prediction heads that were left out. Raises `CommandError`."""
    folders = _folders_with(source, _FUSION_CONFIG)
    if len(folders) > 1:
        raise CommandError(f"{source} has {len(folders)} fusions; put one with its adapters into a folder of its own")
    folder = folders[0]
    config = _json(folder / _FUSION_CONFIG)
    names = config.get("adapter_names")
    names = names.split(",") if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CommandError(f"{folder / _FUSION_CONFIG}: adapter_names is {names!r}, not the names of adapters")
    saved = {_json(own / _CONFIG).get("name"): own for own in _folders_with(source, _CONFIG)}
    tensors = _weights(folder, _FUSION_WEIGHTS)
    configs: dict[str, Any] = {}
    for name in names:
        if name not in saved:
            raise CommandError(f"the fusion's adapter '{name}' is not under {source}; save it there with save_adapter")
        configs[name] = _json(saved[name] / _CONFIG).get("config")
        tensors |= _weights(saved[name], _WEIGHTS)
    head = _weights(folder, _HEAD_WEIGHTS) if any((folder / name).is_file() for name in _HEAD_WEIGHTS) else None
    make_folder(output)
    joined = {**config, "adapter_names": names, "adapters": configs}
    (output / _CONFIG).write_text(json.dumps(joined, indent=2) + "\n")
    save_file(tensors, output / _WEIGHTS[0])
    if head is not None:
        save_file(head, output / _HEAD_WEIGHTS[0])
        if (folder / _HEAD_CONFIG).is_file():
            shutil.copyfile(folder / _HEAD_CONFIG, output / _HEAD_CONFIG)
    others = {saved[name] for name in names} - {folder}
    return sorted(own / name for own in others for name in _HEAD_WEIGHTS if (own / name).is_file())


def _folders_with(source: Path, name: str) -> list[Path]:
    """The folder itself and those in it that have a file of that name, in order."""
    folders = [source, *(path for path in sorted(source.iterdir()) if path.is_dir())]
    return [folder for folder in folders if (folder / name).is_file()]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CommandError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CommandError(f"{path} is not a JSON object")
    return content


def _weights(folder: Path, names: tuple[str, str]) -> dict[str, Tensor]:
    """Of safetensors, or else of a pickle."""
    safe, pickled = (folder / name for name in names)
    if safe.is_file():
        try:
            return load_file(safe)
        except SafetensorError as error:
            raise CommandError(f"{safe} is not safetensors: {error}") from None
    if pickled.is_file():
        return pickled_tensors(pickled)
    raise CommandError(f"{folder} has no {names[0]} or {names[1]}")
