"""An adapter's files as config and tensors. Nothing in them is trusted; pickled weights are never opened.

Which files there are follows from the config, which tells the format:

    peft_type       PEFT         adapter_model.safetensors
    config          AdapterHub   adapter.safetensors; a prediction head beside it may come too
    medley_method   our own      adapter_model.safetensors, if the method has tensors

Every tensor must be taken by the method that reads the checkpoint: one that is left over would mean that the
server answers with less than what was trained, so it refuses the checkpoint (`close`). A method that makes more of a
tensor than what is stored says so before it does (`expand`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
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
HUB_WEIGHTS_FILE = "adapter.safetensors"
DERIVED_FILE = "medley.json"
HEAD_CONFIG_FILE = "head_config.json"
HEAD_WEIGHTS_FILE = "model_head.safetensors"
_FILES = (CONFIG_FILE, WEIGHTS_FILE, HUB_WEIGHTS_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, DERIVED_FILE)
_MOST_CONFIG_BYTES = 2**20  # parsing holds the interpreter's lock, so a step that is due waits for it
PEFT_KEY, HUB_KEY, OWN_KEY = "peft_type", "config", "medley_method"  # the key of the config that tells the format
_FORMATS: dict[str, tuple[str, ...]] = {  # its files: the config, the weights, others
    PEFT_KEY: (CONFIG_FILE, WEIGHTS_FILE),
    HUB_KEY: (CONFIG_FILE, HUB_WEIGHTS_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE),
    OWN_KEY: (CONFIG_FILE, WEIGHTS_FILE),
}
_LARGEST = sys.float_info.max
LARGEST_INTEGER = 2**63 - 1  # of a tensor's sizes

# Keys of PEFT's configs that say how an adapter was trained or found, not what it computes.
_DESCRIPTIVE = {
    "medley_method",
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


@dataclass
class _Expanded:
    """What all parts of a checkpoint have made of their tensors."""

    room: int | None  # bytes
    bytes: int = 0


class Checkpoint:
    """One adapter's config and tensors, the tensors cast to the base's dtype as they are taken."""

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, room: int | None = None
    ) -> None:
        """Use `parse` for bytes from outside."""
        self.config = config
        self.derived: dict[str, Any] = {}  # what the server found out at the upload; see `server.api.derived`
        self.head: dict[str, Tensor] | None = None  # the tensors of a prediction head, as stored
        self.head_config: dict[str, Any] | None = None  # what it is
        self.warnings: list[str] = []
        self.parameters = sum(tensor.numel() for tensor in tensors.values())
        self._dtype = dtype
        self._left = dict(tensors)
        self._expanded = _Expanded(room)

    @classmethod
    def parse(cls, files: Mapping[str, bytes], dtype: torch.dtype, room: int | None = None) -> Checkpoint:
        """From the contents of the files; `room` is how many bytes an adapter may take resident, if that is known.
        Raises `AdapterError` with the contract's codes."""
        if CONFIG_FILE not in files:
            raise AdapterError("missing_file", f"the adapter has no {CONFIG_FILE}", CONFIG_FILE)
        config = _parse_config(files[CONFIG_FILE])
        of_format = _FORMATS[_format_key(config)]
        for name in files:
            if name not in (*of_format, DERIVED_FILE):
                message = f"{name} is no file of this adapter's format, which {CONFIG_FILE} tells; leave it out"
                raise AdapterError("unknown_file", message, name)
        weights = of_format[1]
        if weights not in files and OWN_KEY not in config:
            raise AdapterError("missing_file", f"the adapter has no {weights}", weights)
        checkpoint = cls(config, _parse_tensors(files[weights], weights) if weights in files else {}, dtype, room)
        if DERIVED_FILE in files:
            checkpoint.derived = _parse_object(files[DERIVED_FILE], DERIVED_FILE)
        if HEAD_WEIGHTS_FILE in files:
            checkpoint.head = _parse_tensors(files[HEAD_WEIGHTS_FILE], HEAD_WEIGHTS_FILE)
            if HEAD_CONFIG_FILE in files:
                checkpoint.head_config = _parse_object(files[HEAD_CONFIG_FILE], HEAD_CONFIG_FILE)
        elif HEAD_CONFIG_FILE in files:
            raise AdapterError("missing_file", f"the adapter has {HEAD_CONFIG_FILE} and no {HEAD_WEIGHTS_FILE}")
        return checkpoint

    @classmethod
    def open(cls, folder: Path, dtype: torch.dtype, room: int | None = None) -> Checkpoint:
        """From a local folder that holds the files; others in it are not looked at. See `parse`."""
        files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).exists()}
        return cls.parse(files, dtype, room)

    @property
    def format_key(self) -> str:
        """The key of the config that tells the format, and names the method."""
        return _format_key(self.config)

    def part(self, config: dict[str, Any]) -> Checkpoint:
        """The same tensors, warnings and room, of which several parts may take theirs, under another config."""
        part = copy(self)
        part.config = config
        return part

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

    def take_copy(self, name: str, own: Tensor) -> bool:
        """Remove a tensor that is a copy of the base's `own`, in its dtype; it is no parameter of the adapter's. False,
        and it stays, where it is another."""
        stored = self._left[name]
        if stored.shape != own.shape or not torch.equal(stored.to(self._dtype), own):
            return False
        del self._left[name]
        self.parameters -= own.numel()
        return True

    def take_indices(self, name: str) -> Tensor:
        """Remove and return a tensor of whole numbers, of any shape. Raises as `take` does."""
        if name not in self._left:
            raise AdapterError("base_mismatch", f"the adapter has no tensor {name}", name)
        stored = self._left.pop(name)
        if stored.dtype not in (torch.int64, torch.int32):
            raise AdapterError("bad_config", f"tensor {name} holds {stored.dtype}, not int32 or int64", name)
        return stored

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, made of the one called `name`. Raises `not_finite` when a value is NaN or infinite."""
        # A sum is an eighth of the test of each value, and finite only where all of them are; a large one may overflow.
        if not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
            raise AdapterError("not_finite", f"tensor {name} holds NaN or infinity in {self._dtype}", name)
        return tensor

    def expand(self, name: str, values: int) -> None:
        """Say that so many values are about to be made of the tensor or setting called `name`, to stay resident.

        Raises `too_large` where they, with those before them, do not fit: a small file must not take the host's memory.
        """
        made = self._expanded
        made.bytes += values * self._dtype.itemsize
        if made.room is not None and made.bytes > made.room:
            takes = f"with what is made of {name} it takes at least {made.bytes} bytes resident"
            raise AdapterError("too_large", f"{takes}; the server's adapter memory is {made.room}", name)

    def integer(self, key: str) -> int:
        """A positive whole number of the config."""
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AdapterError("bad_config", f"{key} is {value!r}; it must be a positive whole number", key)
        if value > LARGEST_INTEGER:  # which may have thousands of digits
            raise AdapterError("bad_config", f"{key} is too large; at most {LARGEST_INTEGER} is possible", key)
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


def _parse_object(content: bytes, name: str) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterError("bad_config", f"{name} is not JSON: {error}", name) from error
    if not isinstance(decoded, dict):
        raise AdapterError("bad_config", f"{name} is not a JSON object", name)
    return decoded


def _parse_config(content: bytes) -> dict[str, Any]:
    if len(content) > _MOST_CONFIG_BYTES:
        message = f"{CONFIG_FILE} has {len(content)} bytes; at most {_MOST_CONFIG_BYTES} are possible"
        raise AdapterError("too_large", message, CONFIG_FILE)
    config = _parse_object(content, CONFIG_FILE)
    named = [key for key in _FORMATS if config.get(key) is not None]
    if len(named) != 1:
        message = (
            f"{CONFIG_FILE} names {' and '.join(named) or 'no peft_type'}; it must be one of {', '.join(_FORMATS)}"
        )
        raise AdapterError("bad_config", message, "peft_type")
    if named != [HUB_KEY] and not isinstance(config[named[0]], str):
        raise AdapterError("bad_config", f"{CONFIG_FILE}: {named[0]} is {config[named[0]]!r}, not a name", named[0])
    return config


def _format_key(config: dict[str, Any]) -> str:
    return next(key for key in _FORMATS if config.get(key) is not None)


def _parse_tensors(content: bytes, name: str) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError("not_safetensors", f"{name} is not safetensors: {error}", name) from error
