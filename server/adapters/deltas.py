"""The kinds of row deltas that methods share. Each states its meaning as one line of mathematics.

`[groups, tokens, …]`: a delta is applied to several groups of tokens at once, each with the rows of its own adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.model import DeltaKind, NormForm, RowDelta


@dataclass(frozen=True)
class _OutputScale(DeltaKind):
    is_elementwise = True
    compiled = "scale"

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        (change,) = blocks  # [groups, 1, out]
        outputs.addcmul_(outputs, change)


@dataclass(frozen=True)
class _InputScale(DeltaKind):
    changes_input = True
    is_elementwise = True
    compiled = "scale"

    def change_input(self, inputs: Tensor, *blocks: Tensor) -> None:
        (change,) = blocks  # [groups, 1, in]
        inputs.addcmul_(inputs, change)


@dataclass(frozen=True)
class _LowRank(DeltaKind):
    compiled = "low_rank"

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


@dataclass(frozen=True)
class _Shift(DeltaKind):
    is_elementwise = True
    compiled = "shift"

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        (shift,) = blocks  # [groups, 1, out]
        outputs.add_(shift)


@dataclass(frozen=True)
class _InTurn(DeltaKind):
    kinds: tuple[DeltaKind, ...]
    counts: tuple[int, ...]  # blocks of each
    is_relative: bool
    by_adapter: bool

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        start = 0
        for kind, count in zip(self.kinds, self.counts, strict=True):
            kind.change_output(inputs, outputs, *blocks[start : start + count])
            start += count


@dataclass(frozen=True)
class _Kronecker(DeltaKind):
    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        left, *right = blocks  # [groups, a, c]; the right matrix's factors, each applied to rows from the right
        groups, tokens, _ = inputs.shape
        grid = inputs.reshape(groups, tokens * left.shape[2], -1)  # [groups, tokens · c, d]
        for factor in right:
            grid = grid @ factor
        grid = grid.view(groups, tokens, left.shape[2], -1)  # [groups, tokens, c, b]
        outputs.add_((left[:, None] @ grid).flatten(2))


def shift(values: Tensor) -> RowDelta:
    """y ← y + v; `values` `[out]`."""
    return RowDelta(_Shift(), (values[None],))


def in_turn(*deltas: RowDelta, is_relative: bool = False) -> RowDelta:
    """One change of a module's output after another, each of what the one before has made of it; all see the same
    input. For one delta it is that delta. `is_relative`: together they are meant for the base's own output."""
    assert not any(delta.kind.changes_input for delta in deltas), "the order of input changes is the reverse"
    if len(deltas) == 1 and not is_relative:
        return deltas[0]
    kinds, counts = tuple(delta.kind for delta in deltas), tuple(len(delta.blocks) for delta in deltas)
    kind = _InTurn(kinds, counts, is_relative, by_adapter=any(kind.by_adapter for kind in kinds))
    return RowDelta(kind, tuple(block for delta in deltas for block in delta.blocks))


def kronecker(left: Tensor, *right: Tensor) -> RowDelta:
    """y ← y + (w₁ ⊗ w₂) x; `left` is w₁ `[a, c]` with the adapter's scaling folded in, `right` is w₂ᵀ `[d, b]` or its
    two factors `[d, rank]`, `[rank, b]`; x has c · d values, y a · b. (w₁ ⊗ w₂) x is w₁ X w₂ᵀ row by row, where X is x
    as `[c, d]`."""
    return RowDelta(_Kronecker(), (left, *right))


@dataclass(frozen=True)
class _NormScale(DeltaKind):
    form: NormForm

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        (change,) = blocks  # [groups, 1, width]
        outputs.addcmul_(self.form.normalized(inputs), change)


@dataclass(frozen=True)
class _TokenShift(DeltaKind):
    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        direction, weight, bias = blocks  # [groups, 1, out], [groups, 1, in], [groups, 1, 1]
        outputs.addcmul_((inputs * weight).sum(-1, keepdim=True) + bias, direction)


def norm_scale(change: Tensor, form: NormForm) -> RowDelta:
    """y ← y + Δw ⊙ n(x), at a norm; `change` is Δw `[width]`."""
    return RowDelta(_NormScale(form), (change[None],))


def token_shift(direction: Tensor, weight: Tensor, bias: Tensor) -> RowDelta:
    """y ← y + (a · x + c) v: a shift in one direction, as far as each token's input says. `direction` v `[out]`,
    `weight` a `[in]`, `bias` c `[1]`."""
    return RowDelta(_TokenShift(), (direction[None], weight[None], bias[None]))
