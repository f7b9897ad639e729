"""Biases that PEFT trained beside an adapter (`bias` in its config) and saved with it.

With `lora_only` a checkpoint holds the bias of each targeted module that has one, as `<module>.base_layer.bias`; with
`all` every other bias of the model too, as `<module>.bias`. A saved bias replaces the base's, so it is kept as the
difference from it; one that training has left alone costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.targets import KEY_PREFIX
from server.errors import AdapterError
from server.model import BaseShape

_ENDING = ".bias"


def take_biases(checkpoint: Checkpoint, base: BaseShape, targeted: Collection[str]) -> dict[str, Tensor]:
    """Site → saved bias - base's bias, `[out]`, where they differ.

    Raises `bad_config` for another value of `bias`, `base_mismatch` where a targeted module's bias is missing,
    `unsupported_method` for a changed bias of a module that is no site (neither linear nor a norm).
    """
    which = checkpoint.config.get("bias") or "none"
    if which not in ("none", "lora_only", "all"):
        raise AdapterError("bad_config", f"bias is {which!r}; it must be 'none', 'lora_only' or 'all'", "bias")
    names: dict[str, str] = {}
    if which != "none":
        names = {site: f"{KEY_PREFIX}{site}.base_layer{_ENDING}" for site in targeted if base.bias(site) is not None}
    if which == "all":
        for name in checkpoint.names:
            if name.startswith(KEY_PREFIX) and name.endswith(_ENDING) and name not in names.values():
                names[name.removeprefix(KEY_PREFIX).removesuffix(_ENDING)] = name
    changes: dict[str, Tensor] = {}
    for module, name in names.items():
        own = _own_bias(base, module)
        if own is None:
            continue  # nobody takes it, so the checkpoint is refused when it is closed
        saved = checkpoint.take(name, (len(own),))
        change = saved - own.to(saved.device)
        if not change.any():
            continue
        if module not in base.sites:
            message = f"tensor {name} changes the bias of a module that is neither linear nor a norm that is served"
            raise AdapterError("unsupported_method", message, name)
        changes[module] = change
    return changes


def _own_bias(base: BaseShape, module: str) -> Tensor | None:
    """The base's bias of any module; None where there is no such module or it has none."""
    try:
        return base.bias(module)
    except AttributeError:  # a name from the file
        return None
