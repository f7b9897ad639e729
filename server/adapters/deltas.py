"""The kinds of row deltas that methods share. Each states its meaning as one line of mathematics.

`[groups, tokens, …]`: a delta is applied to several groups of tokens at once, each with the rows of its own adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.model import DeltaKind, RowDelta


@dataclass(frozen=True)
class _OutputScale(DeltaKind):
    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        (change,) = blocks  # [groups, 1, out]
        outputs.addcmul_(outputs, change)


@dataclass(frozen=True)
class _InputScale(DeltaKind):
    changes_input = True

    def change_input(self, inputs: Tensor, *blocks: Tensor) -> None:
        (change,) = blocks  # [groups, 1, in]
        inputs.addcmul_(inputs, change)


@dataclass(frozen=True)
class _LowRank(DeltaKind):
    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        down, up = blocks  # [groups, rank, in], [groups, rank, out]
        if len(inputs) == 1:
            outputs[0].addmm_(inputs[0] @ down[0].t(), up[0])
        else:
            outputs.baddbmm_(inputs @ down.transpose(1, 2), up)


def output_scale(scale: Tensor) -> RowDelta:
    """y ← l ⊙ y; `scale` `[out]`. Kept as l - 1, so that a row of zeros changes nothing."""
    return RowDelta(_OutputScale(), ((scale - 1)[None],))


def input_scale(scale: Tensor) -> RowDelta:
    """x ← l ⊙ x, before the module; `scale` `[in]`. Kept as l - 1."""
    return RowDelta(_InputScale(), ((scale - 1)[None],))


def low_rank(down: Tensor, up: Tensor) -> RowDelta:
    """y ← y + B A x; `down` is A `[rank, in]`, `up` is Bᵀ `[rank, out]` with the adapter's scaling folded in."""
    return RowDelta(_LowRank(), (down, up))
