"""AdapterFusion as a row delta of a block: each token's attention over what several bottlenecks would add.

With h the output of the sub-block, r the residual stream before it, uⱼ(x) = Uⱼ nⱼ(x) + bⱼ what bottleneck j adds (nⱼ
its narrow values) and W_q, c, W_k, W_v the fusion's matrices and the query's bias:

    y = Σⱼ softmaxⱼ((W_q z + c) · W_k uⱼ(x)) W_v uⱼ(x) + q         z the query's input, q the residual

A key's bias adds the same to every score, so it changes nothing. Both sides of the scores and the values are linear in
(nⱼ, 1), so the matrices are multiplied into Uⱼ and bⱼ once: with eⱼ = (nⱼ, 1), Eⱼ = [Uⱼ bⱼ], Sⱼ = Eⱼᵀ W_kᵀ W_q and
Vⱼ = W_v Eⱼ a score is eⱼ · (Sⱼ z + Eⱼᵀ W_kᵀ c) and a value Vⱼ eⱼ. No matrix `[d, d]` is left to be read for each token,
except W_v where the residual goes through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from server.adapters.adapterhub.bottleneck_kind import ACTIVATIONS, EPSILON, Flags, Network
from server.model import DeltaKind, RowDelta


class Member(NamedTuple):
    """One of the bottlenecks, without its values."""

    width: int
    non_linearity: str  # one of `ACTIVATIONS`
    ln_before: bool


@dataclass(frozen=True, eq=False)
class FusionWeights:
    """The fusion's matrices at one place, in float64; an identity for one that the fusion leaves out."""

    query: Tensor  # [d, d]
    query_bias: Tensor  # [d]
    key: Tensor  # [d, d]
    value: Tensor  # [d, d]


@dataclass(frozen=True)
class _Fusion(DeltaKind):
    members: tuple[Member, ...]
    is_parallel: bool  # x = z = q = r; else x = h + r if adds_residual else h
    adds_residual: bool
    query_is_output: bool  # z = h, else x
    residual_is_output: bool  # q = h, else x
    residuals: int  # how often r is added beyond the base's own
    is_residual_projected: bool  # q goes through W_v

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        down, down_bias, score, score_bias, value, *more = blocks
        residual = inputs
        x = residual if self.is_parallel else outputs + residual if self.adds_residual else outputs
        query = outputs if self.query_is_output else x
        narrow = self._narrow(x, down, down_bias.transpose(1, 2))
        scores = narrow * torch.baddbmm(score_bias.transpose(1, 2), query, score.transpose(1, 2))
        parts = [member.width + 1 for member in self.members]
        summed = torch.stack([part.sum(-1, dtype=torch.float32) for part in torch.split(scores, parts, -1)], -1)
        weights = summed.softmax(-1).to(narrow.dtype)  # [groups, tokens, members]
        spread = torch.cat([weights[..., j : j + 1].expand(-1, -1, part) for j, part in enumerate(parts)], -1)
        update = torch.bmm(narrow * spread, value)
        if self.is_residual_projected:
            matrix, *more = more  # (W_v - 1)ᵀ: q itself is there already
            update = update + torch.bmm(outputs if self.residual_is_output else x, matrix)
        if self.residuals:
            (presence,) = more  # [groups, 1, 1]
            update = update + self.residuals * presence * residual
        outputs.add_(update)

    def _narrow(self, x: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        """Each member's narrow values and a 1, one member's after the other's: `[groups, tokens, Σ(width + 1)]`."""
        normed = functional.layer_norm(x, x.shape[-1:], eps=EPSILON) if any(m.ln_before for m in self.members) else x
        one = x.new_ones(()).expand(*x.shape[:-1], 1)
        parts: list[Tensor] = []
        start = 0
        for member in self.members:
            rows = slice(start, start + member.width)
            start += member.width
            given = normed if member.ln_before else x
            values = torch.baddbmm(down_bias[..., rows], given, down[:, rows].transpose(1, 2))
            parts += [ACTIVATIONS[member.non_linearity](values), one]
        return torch.cat(parts, -1)


def fusion(
    members: list[tuple[Flags, Network]], weights: FusionWeights, *, query_before_ln: bool, residual_before: bool
) -> RowDelta:
    """The delta of a block. The last member's flags decide about x, z and q, as in the library; of the others' only
    the activation and the norm before count."""
    flags = members[-1][0]
    dtype = members[-1][1].up.dtype
    extended = torch.cat([torch.cat([network.up, network.up_bias[None]]).double() for _, network in members])
    folded = [_without_norm(network, has_norm=own.ln_before) for own, network in members]
    keys = extended @ weights.key.t()  # Eᵀ W_kᵀ
    blocks = [
        torch.cat([down for down, _ in folded]),
        torch.cat([bias for _, bias in folded])[:, None],
        keys @ weights.query,
        (keys @ weights.query_bias)[:, None],
        extended @ weights.value.t(),
    ]
    identity = torch.eye(len(weights.value), dtype=torch.float64)
    is_projected = residual_before and not torch.equal(weights.value, identity)
    if is_projected:
        blocks.append(weights.value.t() - identity)
    own_residual = flags.is_parallel or (flags.original_ln_before and not flags.residual_before_ln)
    residuals = int(own_residual) - int(not flags.original_ln_after)
    if residuals:
        blocks.append(torch.ones(1, 1))
    kind = _Fusion(
        tuple(Member(len(network.down), own.non_linearity, own.ln_before) for own, network in members),
        flags.is_parallel,
        flags.original_ln_before,
        query_is_output=query_before_ln and not flags.is_parallel,
        residual_is_output=flags.residual_before_ln and not flags.is_parallel,
        residuals=residuals,
        is_residual_projected=is_projected,
    )
    return RowDelta(kind, tuple(block.to(dtype).contiguous() for block in blocks))


def _without_norm(network: Network, *, has_norm: bool) -> tuple[Tensor, Tensor]:
    """`down` and its bias, in float64, with the weight and bias of the norm before multiplied in."""
    down, bias = network.down.double(), network.down_bias.double()
    if not has_norm:
        return down, bias
    weight, shift = (norm.double() for norm in network.norms[:2])
    return down * weight, bias + down @ shift
