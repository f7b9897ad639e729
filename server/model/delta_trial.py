"""Kernels for row deltas tried on random rows, against sums in float64 that are plainly right.

Also what makes a kernel's variants ready before the first step: tokens side by side and apart, widths that are
multiples of 16 and widths that are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from server.model.row_deltas import Blocks, DeltaBackend, DeltaKind, Rows, TokenRows

_TOKENS = 9
_WIDTHS = ((2080, 144), (77, 131))  # (in, out); the first in is more than a kernel reads at once
_RANKS = (1, 3, 8, 16, 64)
_ROWS = 200  # of the pool
_FIRST = 16  # that is not zero, of any width
_CHOSEN: tuple[slice | list[int], ...] = (slice(0, _TOKENS), slice(3, 8), [0, 2, 3, 8])


@dataclass(frozen=True)
class Named(DeltaKind):
    """A kind that is known by its kernel's name alone."""

    compiled: str


def worst_difference(kernels: DeltaBackend, name: str, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference between a kernel and what it stands for, relative to the largest value; infinite where
    there is no kernel of this name, or where it touches what it must not: other tokens, and tokens whose rows are zero.
    """
    kernel = kernels.of(Named(name))
    if kernel is None:
        return float("inf")
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for (inner, outer), chosen, rank in _cases(name):
        inputs = torch.randn(_TOKENS, inner, generator=generator).to(device, dtype)
        outputs = torch.randn(_TOKENS, outer, generator=generator).to(device, dtype)
        memory = torch.randn(_ROWS * max(inner, outer), generator=generator).to(device, dtype)
        memory[: max(inner, outer)] = 0
        widths = (inner, outer) if name == "low_rank" else (outer,)
        pools = [memory[: _ROWS * width].view(_ROWS, width) for width in widths]  # one pool, seen as rows of each width
        places = torch.arange(_TOKENS)[chosen]
        for blocks, index in _blocks(pools, len(places), rank, generator):
            given = outputs.clone()
            kernel(inputs, given, chosen if isinstance(chosen, slice) else places.to(device), blocks)
            rows = [pool.double().cpu()[each] for pool, each in zip(pools, index, strict=True)]
            before, after = outputs.double().cpu(), given.double().cpu()
            change = torch.zeros_like(before)
            change[places] = _change(name, inputs.double().cpu()[places], before[places], rows)
            worst = max(worst, _difference(before, after, change))
    return worst


def _difference(before: Tensor, after: Tensor, change: Tensor) -> float:
    is_kept = ~change.any(1)
    difference = (after - before - change).abs().max() / (before + change).abs().max()
    is_right = bool(difference.isfinite()) and torch.equal(after[is_kept], before[is_kept])
    return float(difference) if is_right else float("inf")


def _cases(name: str) -> Iterator[tuple[tuple[int, int], slice | list[int], int]]:
    """Widths, tokens, rank."""
    for widths in _WIDTHS:
        for tokens in _CHOSEN:
            for rank in _RANKS if name == "low_rank" else (1,):
                yield widths, tokens, rank


def _blocks(
    pools: list[Tensor], tokens: int, rank: int, generator: torch.Generator
) -> Iterator[tuple[Blocks, list[Tensor]]]:
    """One adapter's, each token's own, and these with their indices as a padded step has them; each with all indices
    `[tokens, rank]` of every block."""
    firsts = torch.randint(_FIRST, _ROWS - rank, (len(pools),), generator=generator)
    common = tuple(Rows(pool, int(first), rank) for pool, first in zip(pools, firsts, strict=True))
    yield common, [(first + torch.arange(rank)).expand(tokens, -1) for first in firsts]
    own = list(torch.randint(_FIRST, _ROWS, (len(pools), tokens, rank), generator=generator))
    for index in own:
        index[1] = 0
    placed = [index.to(pools[0].device) for index in own]
    yield tuple(map(TokenRows, pools, placed)), own
    turned = [index.t().contiguous().t() for index in placed]
    yield tuple(map(TokenRows, pools, turned)), own


def _change(name: str, inputs: Tensor, outputs: Tensor, rows: list[Tensor]) -> Tensor:
    """What is added to `outputs`; `rows` are `[tokens, rank, width]`."""
    match name, rows:
        case "low_rank", [down, up]:
            return torch.einsum("tri,ti,tro->to", down, inputs, up)
        case "scale", [change]:
            return outputs * change[:, 0]
        case "shift", [change]:
            return change[:, 0]
    raise AssertionError(f"no kernel is called {name}")
