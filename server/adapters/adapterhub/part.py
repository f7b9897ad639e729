"""What the readers of AdapterHub's architectures are given: one method's config and tensors."""

from __future__ import annotations

from dataclasses import dataclass

from server.adapters.checkpoint import Checkpoint
from server.errors import AdapterError
from server.model import BaseShape


@dataclass(frozen=True)
class HubPart:
    """One method of a file."""

    checkpoint: Checkpoint  # its config is the method's own
    name: str  # of the adapter, as it stands in the tensors' names
    version: tuple[int, int]  # of the library that saved it

    def layers(self, base: BaseShape) -> list[int]:
        """Numbers of the layers that have the method: all but `leave_out`."""
        left_out = self.checkpoint.config.get("leave_out") or []
        if not isinstance(left_out, list) or not all(type(number) is int for number in left_out):
            message = f"leave_out is {left_out!r}; it must be a list of the layers' numbers"
            raise AdapterError("bad_config", message, "leave_out")
        return [number for number in range(len(base.layers)) if number not in left_out]
