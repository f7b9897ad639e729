"""What the recipes have in common: random values, the base's modules, and an adapter's files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.workload import Workload
from server.adapters.checkpoint import CONFIG_FILE

_NOISE = 0.05

Write = Callable[[PreTrainedModel, Workload, Path], None]
"""Write one adapter for a base that is the function's own into a folder that is there."""


def noise(like: Tensor) -> Tensor:
    """Small values of the same shape."""
    return torch.randn_like(like) * _NOISE


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: str) -> None:
    """The config, and a file called `weights` if there are tensors."""
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    if tensors:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / weights)


def linears(base: PreTrainedModel) -> dict[str, nn.Linear]:
    """Of the layers."""
    modules = base.get_submodule("model.layers").named_modules(prefix="model.layers")
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}
