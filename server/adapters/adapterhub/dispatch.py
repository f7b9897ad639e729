"""The format of AdapterHub's `adapters`: which of its methods a checkpoint holds.

`adapter_config.json` has the adapter's `name`, which is part of its tensors' names, and the method's own config as
`config`, whose `architecture` tells the method (absent: a bottleneck; a fusion of several, where there are also
`adapter_names`). `adapter.safetensors` has the tensors. Beside
them may lie a prediction head (`head_config.json`, `model_head.safetensors`), which the library saves by default: one
that classifies is served (`heads`), and one that is the base's own output layer, as the library writes it untrained,
changes nothing and is accepted.

The places at which an architecture acts are those that the library chooses for Llama; files for other models are
refused. The library: Poth et al., "Adapters: A Unified Library for Parameter-Efficient and Modular Transfer Learning",
EMNLP 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from server.adapters.adapterhub import bottleneck, fusion, low_rank, prefix, union
from server.adapters.adapterhub.part import HubPart
from server.adapters.checkpoint import HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, Checkpoint
from server.adapters.heads import read_hub_head
from server.adapters.method import Adapter
from server.errors import AdapterError
from server.model import BaseShape

_MODEL_TYPE = "llama"
_HEAD = "lm_head"

# By `config.architecture`; None is the bottleneck family's place.
_READERS: dict[str | None, Callable[[HubPart, BaseShape], Adapter]] = {
    None: bottleneck.read,
    "lora": low_rank.read,
    "prefix_tuning": prefix.read,
    "union": union.read,
}


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """The adapter of a checkpoint in this format. Raises `AdapterError`."""
    outer = checkpoint.config
    config = outer["config"]
    if not isinstance(config, dict):
        message = f"config is {config!r}, the name of a configuration; save the adapter anew with adapters 1.x"
        raise AdapterError("unsupported_method", message, "config")
    if outer.get("model_type") != _MODEL_TYPE:
        message = f"model_type is {outer.get('model_type')!r}; of AdapterHub's files those for {_MODEL_TYPE} are read"
        raise AdapterError("unsupported_method", message, "model_type")
    name = outer.get("name")
    if not isinstance(name, str) or not name:
        raise AdapterError("bad_config", f"name is {name!r}; it must be the adapter's name", "name")
    architecture = config.get("architecture")
    reader = _READERS.get(architecture) if architecture is None or isinstance(architecture, str) else None
    if reader is None:
        known = ", ".join(name or "none (bottleneck)" for name in _READERS)
        message = f"config.architecture is {architecture!r}, which is not served here; {known} are"
        raise AdapterError("unsupported_method", message, "architecture")
    head = read_hub_head(checkpoint, name, base)
    if head is None:
        _check_head(checkpoint, base)
    part = HubPart(checkpoint.part(config), name, _version(outer.get("version")))
    adapter = fusion.read(part, outer, base) if fusion.NAMES_KEY in outer else reader(part, base)
    own = sum(tensor.numel() for tensor in (checkpoint.head or {}).values()) if head else 0
    return replace(adapter, head=head, parameters=adapter.parameters + own)


def _version(value: Any) -> tuple[int, int]:
    """(major, minor) of the library that saved the file, which says so as "adapters.1.3.0"."""
    parts = value.removeprefix("adapters.").split(".") if isinstance(value, str) else []
    if len(parts) < 2 or not value.startswith("adapters.") or not all(part.isdecimal() for part in parts[:2]):
        message = f"version is {value!r}; files saved by adapters 0.1 or later are read ('adapters.1.3.0', say)"
        raise AdapterError("unsupported_method", message, "version")
    return int(parts[0]), int(parts[1])


def _check_head(checkpoint: Checkpoint, base: BaseShape) -> None:
    """Refuse a head that changes anything."""
    head = checkpoint.head
    if head is None:
        return
    own = base.weight(_HEAD) if list(head) == [f"{_HEAD}.weight"] and _HEAD in base.sites else None
    saved = head.get(f"{_HEAD}.weight")
    if own is None or saved is None or saved.shape != own.shape or not torch.equal(saved.to(own), own):
        message = (
            f"{HEAD_WEIGHTS_FILE} is a prediction head of its own, which is not served here; save the adapter with "
            f"with_head=False, or leave {HEAD_WEIGHTS_FILE} and {HEAD_CONFIG_FILE} out"
        )
        raise AdapterError("unsupported_method", message, HEAD_WEIGHTS_FILE)
