"""The row deltas that methods share. Each states its meaning as one line of mathematics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.model import RowDelta


@dataclass(frozen=True)
class OutputScale(RowDelta):
    """y ← l ⊙ y."""

    scale: Tensor  # [out]

    def change_output(self, inputs: Tensor, outputs: Tensor) -> None:
        """See `RowDelta`."""
        outputs.mul_(self.scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """See `RowDelta`."""
        return (self.scale,)

    def to(self, device: torch.device) -> OutputScale:
        """See `RowDelta`."""
        return OutputScale(self.scale.to(device))


@dataclass(frozen=True)
class InputScale(RowDelta):
    """x ← l ⊙ x, before the module."""

    scale: Tensor  # [in]
    changes_input = True

    def change_input(self, inputs: Tensor) -> None:
        """See `RowDelta`."""
        inputs.mul_(self.scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """See `RowDelta`."""
        return (self.scale,)

    def to(self, device: torch.device) -> InputScale:
        """See `RowDelta`."""
        return InputScale(self.scale.to(device))


@dataclass(frozen=True)
class LowRank(RowDelta):
    """y ← y + x A B, with the adapter's scaling folded into B."""

    down: Tensor  # A [in, rank]
    up: Tensor  # B [rank, out]

    def change_output(self, inputs: Tensor, outputs: Tensor) -> None:
        """See `RowDelta`."""
        outputs.addmm_(inputs @ self.down, self.up)

    def tensors(self) -> tuple[Tensor, ...]:
        """See `RowDelta`."""
        return self.down, self.up

    def to(self, device: torch.device) -> LowRank:
        """See `RowDelta`."""
        return LowRank(self.down.to(device), self.up.to(device))
