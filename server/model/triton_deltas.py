"""The commonest row deltas on CUDA, each token with its own adapter's rows, read where they lie in the pool.

A low-rank update is two kernels, as in Punica ("Punica: Multi-Tenant LoRA Serving", Chen et al. 2023) and S-LoRA
("S-LoRA: Serving Thousands of Concurrent LoRA Adapters", Sheng et al. 2023): one shrinks each token's input to a number
for each of its rows, the other expands these into its output. Scales and shifts are one.

All sums are float32. Every grid follows from shapes alone, so a CUDA graph can hold the launches and meet other rows at
each replay. What changes from step to step (which tokens, how many, of what rank) is kept from Triton's choice of a
variant, so that no step waits for a compiler once `delta_trial` has run: what is left is whether the widths are
multiples of 16. Imports Triton, which torch brings with it on CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.model.device_deltas import Launch, Placed, Tokens

_WIDE = 2048  # numbers of a row that one program reads at once, where it goes along a row
_NARROW, _RANKS = 128, 16  # of an output, and rows, that one program takes at once, where it goes down the rows

_OPTIONS = {"enable_fp_fusion": True}  # products and sums in one instruction, whatever this Triton's default is

_VARYING = ("tokens", "start", "index", "index_stride", "index_step", "rank")


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def _shrink(  # type: ignore[no-untyped-def]
    inputs,
    input_stride,
    tokens,
    start,
    pool,
    index,
    index_stride,
    index_step,
    factors,
    rank,
    width,
    ARE_NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h = a · x for one of a token's rows a; `factors` is `[tokens, rank]`."""
    place = tl.program_id(0)
    at_rank = tl.program_id(1)
    token = (start + place).to(tl.int64)
    if not ARE_NEIGHBOURS:
        token = tl.load(tokens + place)
    row = tl.load(index + place * index_stride + at_rank * index_step)
    down = pool + row * width
    values = inputs + token * input_stride
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        is_inside = at < width
        value = tl.load(values + at, mask=is_inside, other=0.0).to(tl.float32)
        total += value * tl.load(down + at, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(factors + place * rank + at_rank, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    factors,
    rank,
    pool,
    index,
    index_stride,
    index_step,
    outputs,
    output_stride,
    tokens,
    start,
    width,
    ARE_NEIGHBOURS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y ← y + Σ h b over a token's rows b, for one part of its output."""
    place = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < width
    token = (start + place).to(tl.int64)
    if not ARE_NEIGHBOURS:
        token = tl.load(tokens + place)
    output = outputs + token * output_stride + at
    total = tl.load(output, mask=is_inside, other=0.0).to(tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        is_row = ranks < rank
        rows = tl.load(index + place * index_stride + ranks * index_step, mask=is_row, other=0)
        factor = tl.load(factors + place * rank + ranks, mask=is_row, other=0.0)
        is_read = is_row[:, None] & is_inside[None, :]
        up = tl.load(pool + rows[:, None] * width + at[None, :], mask=is_read, other=0.0).to(tl.float32)
        total += tl.sum(factor[:, None] * up, axis=0)
    tl.store(output, total.to(outputs.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def _change(  # type: ignore[no-untyped-def]
    pool,
    index,
    index_stride,
    outputs,
    output_stride,
    tokens,
    start,
    width,
    ARE_NEIGHBOURS: tl.constexpr,
    IS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y ← y + y ⊙ c, else y ← y + c, for one part of a token's output."""
    place = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < width
    token = (start + place).to(tl.int64)
    if not ARE_NEIGHBOURS:
        token = tl.load(tokens + place)
    row = tl.load(index + place * index_stride)
    change = tl.load(pool + row * width + at, mask=is_inside, other=0.0).to(tl.float32)
    output = outputs + token * output_stride + at
    value = tl.load(output, mask=is_inside, other=0.0).to(tl.float32)
    if IS_SCALE:
        change = value * change
    tl.store(output, (value + change).to(outputs.dtype.element_ty), mask=is_inside)


def _low_rank(inputs: Tensor, outputs: Tensor, tokens: Tokens, down: Placed, up: Placed) -> None:
    """y ← y + Σ (a · x) b."""
    rank, width = down.rows.shape[1], outputs.shape[1]
    factors = torch.empty(tokens.number, rank, dtype=torch.float32, device=outputs.device)
    _shrink[tokens.number, rank](
        inputs,
        inputs.stride(0),
        *_chosen(tokens, down),
        down.pool,
        down.rows,
        *down.rows.stride(),
        factors,
        rank,
        inputs.shape[1],
        ARE_NEIGHBOURS=tokens.chosen is None,
        BLOCK=_WIDE,
        num_warps=8,
        **_OPTIONS,
    )
    _expand[tokens.number, triton.cdiv(width, _NARROW)](
        factors,
        rank,
        up.pool,
        up.rows,
        *up.rows.stride(),
        outputs,
        outputs.stride(0),
        *_chosen(tokens, up),
        width,
        ARE_NEIGHBOURS=tokens.chosen is None,
        RANKS=_RANKS,
        BLOCK=_NARROW,
        num_warps=4,
        **_OPTIONS,
    )


def _elementwise(outputs: Tensor, tokens: Tokens, row: Placed, *, is_scale: bool) -> None:
    width = outputs.shape[1]
    _change[tokens.number, triton.cdiv(width, _WIDE)](
        row.pool,
        row.rows,
        row.rows.stride(0),
        outputs,
        outputs.stride(0),
        *_chosen(tokens, row),
        width,
        ARE_NEIGHBOURS=tokens.chosen is None,
        IS_SCALE=is_scale,
        BLOCK=_WIDE,
        num_warps=8,
        **_OPTIONS,
    )


def _scale(inputs: Tensor, outputs: Tensor, tokens: Tokens, row: Placed) -> None:
    _elementwise(outputs, tokens, row, is_scale=True)


def _shift(inputs: Tensor, outputs: Tensor, tokens: Tokens, row: Placed) -> None:
    _elementwise(outputs, tokens, row, is_scale=False)


def _chosen(tokens: Tokens, placed: Placed) -> tuple[Tensor, int]:
    """`tokens` and `start`; where they are neighbours any pointer will do, for none is read."""
    return (placed.rows if tokens.chosen is None else tokens.chosen), tokens.start


LAUNCHES: Mapping[str, Launch] = {"scale": _scale, "shift": _shift, "low_rank": _low_rank}
"""By the name in `DeltaKind.compiled`."""
