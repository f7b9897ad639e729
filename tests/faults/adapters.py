"""Adapters of one shape that all differ, made from one that PEFT saved: writing a hundred of them takes no time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class Adapters:
    """Numbered adapters in `folder`, like the PEFT folder `pattern` but for their values."""

    def __init__(self, pattern: Path, folder: Path) -> None:
        self._pattern = pattern
        self._folder = folder
        self._shapes = {name: tensor.shape for name, tensor in load_file(pattern / WEIGHTS).items()}

    def __getitem__(self, number: int) -> Path:
        """The folder of adapter `number`, always with the same content."""
        folder = self._folder / str(number)
        if not folder.is_dir():
            folder.mkdir(parents=True)
            shutil.copyfile(self._pattern / CONFIG, folder / CONFIG)
            noise = np.random.default_rng(number)
            tensors = {
                name: noise.normal(0.0, 0.5, shape).astype(np.float32) for name, shape in sorted(self._shapes.items())
            }
            save_file(tensors, folder / WEIGHTS)
        return folder
