"""Deltas of the tests of layers: random ones, in rows of a pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.adapters.deltas import input_scale, low_rank, output_scale, shift
from server.model import FrozenBase, Rows, Segment
from server.model.delta_kernels import DeltaKernels
from server.model.row_deltas import RowDelta
from server.model.sites import SiteKind, SiteShape

KERNELS = DeltaKernels()


def delta_at(kind: str, site: SiteShape, generator: torch.Generator) -> RowDelta:
    """A random one that fits a site; `kind` is "low rank", "shift", "output scale" or "input scale"."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    match kind:
        case "low rank":
            return low_rank(numbers(3, site.inputs), numbers(3, site.outputs))
        case "shift":
            return shift(numbers(site.outputs))
        case "output scale":
            return output_scale(numbers(site.outputs) + 1)
        case _:
            return input_scale(numbers(site.inputs) + 1)


def segment_of(delta: RowDelta, tokens: slice | Tensor, *, by_kernel: bool = True) -> Segment:
    """Of the step's `tokens`, with the delta's rows in a pool; `by_kernel` false: by its own code."""
    kernel = KERNELS.of(delta.kind) if by_kernel else None
    return Segment(tokens, delta.kind, _pooled(delta.blocks), is_each=False, kernel=kernel)


def segment_at(base: FrozenBase, site: str, tokens: slice, kind: str = "low rank") -> dict[str, list[list[Segment]]]:
    """A plan with one delta."""
    delta = delta_at(kind, base.sites.shapes[site], torch.Generator().manual_seed(4))
    by_kernel = base.sites.shapes[site].kind is SiteKind.LINEAR
    return {site: [[segment_of(delta, tokens, by_kernel=by_kernel)]]}


def _pooled(blocks: Sequence[Tensor]) -> tuple[Rows, ...]:
    """Blocks one behind the other in one pool, each from a whole row of its width on."""
    pool = torch.full((sum(block.numel() + block.shape[1] for block in blocks),), torch.nan)
    rows, at = [], 0
    for block in blocks:
        width = block.shape[1]
        first = -(-at // width)
        at = first * width + block.numel()
        pool[at - block.numel() : at] = block.flatten()
        rows.append(Rows(pool[: len(pool) // width * width].view(-1, width), first, len(block)))
    return tuple(rows)
