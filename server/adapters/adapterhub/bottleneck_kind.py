"""Bottleneck adapters as row deltas of a block: a small network after a sub-block, or beside it.

With h the output of the sub-block and r the residual stream before it, the base goes on with h + r. In the terms of
AdapterHub's library, whose flags are the fields of `Flags`, u(x) = up(f(down(norm_before(x)))) and

    sequential:  x = h + r if original_ln_before else h;   q = h if residual_before_ln else x
                 y = norm_after(u(x) + q) if adapter_residual_before_ln else norm_after(u(x)) + q
    parallel:    x = r;   y = norm_after(u(r)) + h
    the base goes on with y + r if original_ln_after else y

What is added to h is the difference between that and h + r. Where it holds more than u, an adapter has a row that says
that it is there (1): rows of zeros must change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from server.model import DeltaKind, RowDelta

EPSILON = 1e-5  # of both norms
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leakyrelu": functional.leaky_relu,
    **{
        name: ACT2FN[name]
        for name in ("relu", "swish", "silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "tanh", "sigmoid")
    },
}


@dataclass(frozen=True)
class Flags:
    """Which of the mathematics; see the module."""

    non_linearity: str  # one of `ACTIVATIONS`
    is_parallel: bool
    original_ln_before: bool
    original_ln_after: bool
    residual_before_ln: bool
    adapter_residual_before_ln: bool
    ln_before: bool
    ln_after: bool

    @property
    def is_normed_with_residual(self) -> bool:
        """Whether a norm acts on u(x) + q. Without one, adding q before or after is the same."""
        return self.ln_after and self.adapter_residual_before_ln and not self.is_parallel

    @property
    def residuals(self) -> int:
        """How often r is added beyond the base's own, outside a norm."""
        count = 0 if self.original_ln_after else -1
        own = not (self.is_parallel or self.residual_before_ln or self.is_normed_with_residual)
        return count + (1 if own and self.original_ln_before else 0)

    @property
    def has_presence(self) -> bool:
        """Whether rows must say that the adapter is there."""
        return self.is_normed_with_residual or self.residuals != 0


@dataclass(frozen=True)
class _Bottleneck(DeltaKind):
    flags: Flags

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        flags, residual = self.flags, inputs
        down, down_bias, up, up_bias, *more = blocks  # [groups, width, d], [·, 1, width], [·, width, d], [·, 1, d]
        x = residual if flags.is_parallel else outputs + residual if flags.original_ln_before else outputs
        own_residual = outputs if flags.residual_before_ln else x
        if flags.ln_before:
            weight, bias, *more = more
            x_in = _normed(x, weight, bias)
        else:
            x_in = x
        narrow = ACTIVATIONS[flags.non_linearity](torch.baddbmm(down_bias, x_in, down.transpose(1, 2)))
        update = torch.baddbmm(up_bias, narrow, up)
        if flags.ln_after:
            weight, bias, *more = more
            update = _normed(update + own_residual if flags.is_normed_with_residual else update, weight, bias)
        if flags.has_presence:
            (presence,) = more  # [groups, 1, 1]
            if flags.is_normed_with_residual:
                update = update - presence * outputs
            update = update + flags.residuals * presence * residual
        outputs.add_(update)


def _normed(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(values, values.shape[-1:], eps=EPSILON) * weight + bias


@dataclass(frozen=True, eq=False)
class Network:
    """The tensors of a bottleneck, scaling folded into `up`."""

    down: Tensor  # [width, d]
    down_bias: Tensor  # [width]
    up: Tensor  # [width, d]: transposed
    up_bias: Tensor  # [d]
    norms: tuple[Tensor, ...] = ()  # weight and bias [d] of the norm before, then of the one after

    def delta(self, flags: Flags) -> RowDelta:
        """As a delta of a block."""
        blocks = [self.down, self.down_bias[None], self.up, self.up_bias[None], *(norm[None] for norm in self.norms)]
        if flags.has_presence:
            blocks.append(torch.ones(1, 1, dtype=self.up.dtype))
        return RowDelta(_Bottleneck(flags), tuple(blocks))
