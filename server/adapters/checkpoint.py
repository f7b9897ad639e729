"""A PEFT folder as config and tensors. Nothing in it is trusted; pickled weights are never opened.

Every tensor must be taken by the method that reads the checkpoint: one that is left over would mean that the
server answers with less than what was trained, so it refuses the checkpoint (`close`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from server.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_MOST_CONFIG_BYTES = 2**20  # parsing holds the interpreter's lock, so a step that is due waits for it
_LARGEST = sys.float_info.max

# Keys of PEFT's configs that say how an adapter was trained or found, not what it computes.
_DESCRIPTIVE = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "base_model_class",
    "parent_library",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
}


class Checkpoint:
    """One adapter's config and tensors, the tensors cast to the base's dtype as they are taken."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Use `parse` for bytes from outside."""
        self.config = config
        self.warnings: list[str] = []
        self.parameters = sum(tensor.numel() for tensor in tensors.values())
        self._dtype = dtype
        self._left = dict(tensors)

    @classmethod
    def parse(cls, files: Mapping[str, bytes], dtype: torch.dtype) -> Checkpoint:
        """From the contents of the two files. Raises `AdapterError` with the contract's codes."""
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if name not in files:
                raise AdapterError("missing_file", f"the adapter has no {name}", name)
        return cls(_parse_config(files[CONFIG_FILE]), _parse_tensors(files[WEIGHTS_FILE]), dtype)

    @classmethod
    def open(cls, folder: Path, dtype: torch.dtype) -> Checkpoint:
        """From a local folder that holds the two files."""
        names = (CONFIG_FILE, WEIGHTS_FILE)
        return cls.parse({name: (folder / name).read_bytes() for name in names if (folder / name).exists()}, dtype)

    @property
    def names(self) -> list[str]:
        """Tensors not yet taken."""
        return list(self._left)

    def take(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """Remove and return a tensor; None in `shape` is any length.

        Raises `base_mismatch` when it is absent or of another shape, `not_finite` when a value is NaN or
        infinite once it is in the base's dtype.
        """
        if name not in self._left:
            raise AdapterError("base_mismatch", f"the adapter has no tensor {name}, which this base needs", name)
        stored = self._left.pop(name)
        if len(stored.shape) != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, stored.shape, strict=True)
        ):
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise AdapterError(
                "base_mismatch", f"tensor {name} is {list(stored.shape)} where this base needs [{wanted}]", name
            )
        if not stored.is_floating_point():
            raise AdapterError("bad_config", f"tensor {name} holds {stored.dtype}, not floating-point values", name)
        tensor = stored.to(self._dtype)
        return self.finite(name, tensor)

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, made of the one called `name`. Raises `not_finite` when a value is NaN or infinite."""
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError("not_finite", f"tensor {name} holds NaN or infinity in {self._dtype}", name)
        return tensor

    def integer(self, key: str) -> int:
        """A positive whole number of the config."""
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AdapterError("bad_config", f"{key} is {value!r}; it must be a positive whole number", key)
        return value

    def number(self, key: str, value: Any) -> float:
        """`value`, found at `key`, as a finite number."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not -_LARGEST <= value <= _LARGEST:  # NaN compares as neither
            raise AdapterError("bad_config", f"{key} is {value!r}; it must be a finite number", key)
        return float(value)

    def check_keys(self, *, used: Iterable[str], training_only: Iterable[str], unsupported: Iterable[str]) -> None:
        """Refuse options that change the mathematics and are not implemented; warn of unknown ones."""
        for key in unsupported:
            if self.config.get(key) not in (None, False, "none", {}, []):
                raise AdapterError(
                    "unsupported_method", f"{key} = {self.config[key]!r} is not supported for this method", key
                )
        known = {*used, *training_only, *unsupported, *_DESCRIPTIVE}
        for key in sorted(set(self.config) - known):
            self.warnings.append(f"{key}: unknown setting, ignored as PEFT ignores it")

    def close(self) -> None:
        """Refuse what nobody took."""
        for name in sorted(self._left):
            raise AdapterError(
                "base_mismatch", f"tensor {name} belongs to no module that the config targets in this base", name
            )


def _parse_config(content: bytes) -> dict[str, Any]:
    if len(content) > _MOST_CONFIG_BYTES:
        message = f"{CONFIG_FILE} has {len(content)} bytes; at most {_MOST_CONFIG_BYTES} are possible"
        raise AdapterError("too_large", message, CONFIG_FILE)
    try:
        config = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterError("bad_config", f"{CONFIG_FILE} is not JSON: {error}", CONFIG_FILE) from error
    if not isinstance(config, dict):
        raise AdapterError("bad_config", f"{CONFIG_FILE} is not a JSON object", CONFIG_FILE)
    if not isinstance(config.get("peft_type"), str):
        raise AdapterError("bad_config", f"{CONFIG_FILE} names no peft_type", "peft_type")
    return config


def _parse_tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError("not_safetensors", f"{WEIGHTS_FILE} is not safetensors: {error}", WEIGHTS_FILE) from error
