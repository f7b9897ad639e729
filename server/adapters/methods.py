"""The table of methods. A new method is one file and one line here."""

from __future__ import annotations

from server.adapters import ia3, lora, p_tuning, prefix_tuning, prompt_tuning
from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, Method
from server.errors import AdapterError
from server.model import BaseShape

METHODS: tuple[Method, ...] = (
    prompt_tuning,
    p_tuning,
    prefix_tuning,
    ia3,
    lora,
)

_BY_PEFT_TYPE = {method.PEFT_TYPE: method for method in METHODS}


def read_adapter(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """The adapter of a checkpoint, by the method that its config names."""
    peft_type = checkpoint.config["peft_type"]
    method = _BY_PEFT_TYPE.get(peft_type)
    if method is None:
        known = ", ".join(_BY_PEFT_TYPE)
        raise AdapterError("unsupported_method", f"peft_type {peft_type} is not served here; {known} are", "peft_type")
    return method.read(checkpoint, base)
