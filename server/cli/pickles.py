"""From pickled weights to an adapter's folder with safetensors: what `medley convert` does

Pickles are opened with `torch.load(weights_only=True)`, which builds tensors and plain containers and nothing else.
Only the form changes: names and values stay as they are, except T-Few's names, which become PEFT's of (IA)³, and what
AdapterHub repeats of a prefix under every layer, which in safetensors would be stored as often:

    PEFT folder        adapter_model.bin         adapter_model.safetensors
    AdapterHub folder  pytorch_adapter.bin       adapter.safetensors
                       pytorch_model_head.bin    model_head.safetensors
    T-Few file (.pt)   <module>.multi_lora_b     a PEFT `IA3` folder; ia3_l scales the output of every module

T-Few (Liu et al., NeurIPS 2022) tunes T5: what comes of its files names T5's modules.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from server.cli.errors import CommandError

_CONFIG = "adapter_config.json"
_HEAD_CONFIG = "head_config.json"
_NAMES = {
    "adapter_model.bin": "adapter_model.safetensors",
    "pytorch_adapter.bin": "adapter.safetensors",
    "pytorch_model_head.bin": "model_head.safetensors",
}
_T_FEW_ENDING = ".multi_lora_b"
_PREFIX, _REPEATED_PREFIX = "model.prefix_tuning.", ".prefix_tuning.pool."


def convert_folder(source: Path, output: Path) -> None:
    """Write the folder's config and its pickled weights as safetensors. Raises `CommandError`."""
    pickled = [name for name in _NAMES if (source / name).is_file()]
    if not pickled:
        raise CommandError(f"{source} has no pickled weights; {', '.join(_NAMES)} are converted")
    if not (source / _CONFIG).is_file():
        raise CommandError(f"{source} has no {_CONFIG}, which belongs to {pickled[0]}")
    weights = {_NAMES[name]: pickled_tensors(source / name) for name in pickled}
    make_folder(output)
    for name in (_CONFIG, _HEAD_CONFIG):
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    for name, tensors in weights.items():
        save_file(tensors, output / name)


def convert_file(source: Path, output: Path) -> None:
    """Write a T-Few file's (IA)³ as a PEFT folder. Raises `CommandError`."""
    scales: dict[str, Tensor] = {}
    for name, tensor in pickled_tensors(source).items():
        if not name.endswith(_T_FEW_ENDING) or tensor.dim() != 2 or tensor.shape[1] != 1:
            raise CommandError(
                f"{source}: {name} {list(tensor.shape)} is no (IA)³ vector of T-Few, which is "
                f"<module>{_T_FEW_ENDING} [out, 1]; nothing else of T-Few is converted"
            )
        scales[name.removesuffix(_T_FEW_ENDING)] = tensor
    if not scales:
        raise CommandError(f"{source} holds no tensors")
    config = {
        "peft_type": "IA3",
        "task_type": "SEQ_2_SEQ_LM",
        "target_modules": list(scales),
        "feedforward_modules": [],
        "inference_mode": True,
    }
    make_folder(output)
    (output / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"base_model.model.{module}.ia3_l": scale for module, scale in scales.items()}
    save_file(tensors, output / "adapter_model.safetensors")


def pickled_tensors(path: Path) -> dict[str, Tensor]:
    """A pickled dictionary of tensors, each with memory of its own: safetensors knows no sharing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols, which are read or refused all the same
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever its reader stumbles over; torch's own advice is to open it nevertheless
        raise CommandError(f"{path} is damaged or holds more than weights, and is not opened") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise CommandError(f"{path} is not a dictionary of tensors by name")
    return {
        name: tensor.detach().contiguous().clone()
        for name, tensor in loaded.items()
        if not _is_repeated(name, tensor, loaded)
    }


def _is_repeated(name: str, tensor: Tensor, loaded: Mapping[str, Tensor]) -> bool:
    """Whether it is a prefix's tensor under a layer, which the file has as the model's too."""
    layer, separator, rest = name.partition(_REPEATED_PREFIX)
    own = loaded.get(f"{_PREFIX}{rest}") if separator and layer else None
    return own is not None and own.dtype == tensor.dtype and torch.equal(own, tensor)


def make_folder(output: Path) -> None:
    """Make the output's folder. Nothing is overwritten."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CommandError(f"{output} exists already; name another folder with --output")
    output.mkdir(parents=True, exist_ok=True)
