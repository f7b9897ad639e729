"""Attention on CUDA over pages where they are, by kernels of our own, for rows of one token and of several alike.

The scores of a block of queries are never whole: keys come in tiles, the softmax is carried along, as in FlashAttention
("FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", Dao et al. 2022), and a tile's keys are
found through the row's block table, as in PagedAttention ("Efficient Memory Management for Large Language Model Serving
with PagedAttention", Kwon et al. 2023), so that pages may have any size. Where a step has too few blocks to fill the
device, each one's context is divided among several programs, and a second kernel combines what they found
("Flash-Decoding for long-context inference", Dao et al. 2023).

A block is some tokens of one row with all query heads of one KV head, so that a tile is read once for these. All sums
are float32. Grids follow from shapes and from the padded sizes of `VarlenRows` alone, so a CUDA graph can hold the
launches and meet other rows and lengths at each replay. What changes from step to step is kept from Triton's choice of
a variant: once a variant has been tried, no step waits for a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.model.attention import AttentionOptions, VarlenRows

_LEAST_LINES = 16  # that a product takes, and numbers of a head
_LINES = 64  # of a block in steps with rows of several tokens: a line is one token's query of one head
_TILE_BYTES = 16 * 1024  # of keys in a tile, and of values
_MOST_KEYS = 64  # of a tile
_SPLITS = 16  # that are combined at once
_LEAST_SPLIT = 128  # keys for which a program of its own is worth its start; not measured yet
_MOST_SPLITS = 64
_PROGRAMS = 4  # for each multiprocessor, that together keep its memory busy; not measured yet
_UNBOUNDED = 2**30  # a window that no context reaches

_VARYING = (
    "query",
    "query_token",
    "query_head",
    "tables",
    "table_row",
    "starts",
    "lengths",
    "rows",
    "splits",
    "window",
)


@triton.jit  # type: ignore[untyped-decorator]
def _row_of(block, starts, rows, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The last row whose blocks begin here or before: row i's begin at starts[i] // TOKENS + i, which leaves each row
    enough of them."""
    low = 0
    high = rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // TOKENS + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _raised(peak, other):  # type: ignore[no-untyped-def]
    """The higher of two, what exponents are taken less (no infinity where nothing has been seen), and the factor on
    what was summed below the old peak."""
    raised = tl.maximum(peak, other)
    shift = tl.where(raised == float("-inf"), 0.0, raised)
    return raised, shift, tl.exp2(peak - shift)


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def] # noqa: PLR0915 - a kernel's parts would take a dozen arguments each
    query,
    query_token,
    query_head,
    keys,
    values,
    page_stride,
    slot_stride,
    head_stride,
    tables,
    table_row,
    starts,
    lengths,
    rows,
    sinks,
    outputs,
    logs,
    splits,
    scale,
    window,
    cap,
    heads,
    PAGE: tl.constexpr,
    REPEATS: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_DECODE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One block's share of its context: softmax(scale · q kᵀ) v, or, if it is split, that of the share and the base-2
    logarithm of its denominator. Strides are in elements; `outputs` `[tokens, heads, (splits,) DIM]` is contiguous."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if IS_DECODE:
        row = block
        begin = block
    else:
        row = _row_of(block, starts, rows, TOKENS)
        begin = tl.load(starts + row) // TOKENS + row
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    first_token = (block - begin) * TOKENS
    if first_token >= count:
        return
    length = tl.load(lengths + row)
    first_position = length - count + first_token
    line = tl.arange(0, LINES)
    is_line = (line < TOKENS * REPEATS) & (first_token + line // REPEATS < count)
    token = (start + first_token + line // REPEATS).to(tl.int64)
    head = kv_head * REPEATS + line % REPEATS
    position = first_position + line // REPEATS
    at = tl.arange(0, WIDTH)
    is_inside = at < DIM
    is_query = is_line[:, None] & is_inside[None, :]
    queries = tl.load(query + token[:, None] * query_token + head[:, None] * query_head + at[None, :], is_query, 0.0)

    # of the context what some token of the block sees, in whole tiles from the row's first position on
    last = tl.minimum(first_position + TOKENS, length)
    first = tl.maximum(first_position - window + 1, 0) // KEYS * KEYS
    if IS_SPLIT:
        share = tl.cdiv(tl.cdiv(last - first, KEYS), splits) * KEYS
        first += split * share
        last = tl.minimum(last, first + share)

    LOG2E: tl.constexpr = 1.4426950408889634
    peak = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    if HAS_SINKS:  # in one share alone
        peak = tl.load(sinks + head, is_line & (split == 0), float("-inf")).to(tl.float32) * LOG2E
        total = tl.where(split == 0, total + 1.0, total)
    weighted = tl.zeros([LINES, WIDTH], tl.float32)
    for tile in range(first, last, KEYS):
        place = tile + tl.arange(0, KEYS)
        is_key = place < last  # what lies behind a row's end may be NaN, which must meet no weight, not even 0
        page = tl.load(tables + row * table_row + place // PAGE, is_key, 0).to(tl.int64)
        slot = page * page_stride + place % PAGE * slot_stride + kv_head * head_stride
        key = tl.load(keys + slot[None, :] + at[:, None], is_key[None, :] & is_inside[:, None], 0.0)
        value = tl.load(values + slot[:, None] + at[None, :], is_key[:, None] & is_inside[None, :], 0.0)
        score = tl.dot(queries, key, input_precision="ieee") * scale
        if HAS_CAP:
            score = cap * (2 * tl.sigmoid(2 * score / cap) - 1)  # cap · tanh(score / cap)
        distance = position[:, None] - place[None, :]
        score = tl.where((distance >= 0) & (distance < window), score * LOG2E, float("-inf"))
        peak, shift, decay = _raised(peak, tl.max(score, 1))
        weight = tl.exp2(score - shift[:, None])
        total = total * decay + tl.sum(weight, 1)
        weighted = tl.dot(weight.to(value.dtype), value, weighted * decay[:, None], input_precision="ieee")
    has_seen = total > 0.0
    total = tl.where(has_seen, total, 1.0)
    output = token * heads + head
    if IS_SPLIT:
        output = output * splits + split
        tl.store(logs + output, tl.where(has_seen, peak + tl.log2(total), float("-inf")), is_line)
    weighted = weighted / total[:, None]
    tl.store(outputs + output[:, None] * DIM + at[None, :], weighted.to(outputs.dtype.element_ty), is_query)


@triton.jit(do_not_specialize=("splits",))  # type: ignore[untyped-decorator]
def _combine(parts, logs, outputs, splits, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of one token and head: Σ 2^log part ÷ Σ 2^log over the splits."""
    line = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    is_inside = at < DIM
    peak = float("-inf")
    total = 0.0
    weighted = tl.zeros([WIDTH], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        place = line * splits + split
        log = tl.load(logs + place, split < splits, float("-inf"))
        peak, shift, decay = _raised(peak, tl.max(log, 0))
        weight = tl.exp2(log - shift)
        is_read = (split < splits)[:, None] & is_inside[None, :]
        part = tl.load(parts + place[:, None] * DIM + at[None, :], is_read, 0.0)
        total = total * decay + tl.sum(weight, 0)
        weighted = weighted * decay + tl.sum(weight[:, None] * part, 0)
    tl.store(outputs + line * DIM + at, (weighted / total).to(outputs.dtype.element_ty), is_inside)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: VarlenRows,
    options: AttentionOptions,
    *,
    programs: int,
    splits: int | None = None,
) -> Tensor:
    """See `Kernel` of `server.model.varlen_attention`; `programs` fill the device, `splits` are chosen if not given."""
    num_tokens, heads, dim = query.shape
    _, page_size, kv_heads, _ = keys.shape
    if query.stride(2) != 1:
        query = query.contiguous()
    assert keys.stride() == values.stride()
    assert keys.stride(3) == 1
    repeats = heads // kv_heads
    is_decode = rows.most_tokens == 1
    lines = max(_LEAST_LINES if is_decode else _LINES, triton.next_power_of_2(repeats))
    tokens = 1 if is_decode else lines // repeats
    count = len(rows.lengths)
    blocks = count if is_decode else num_tokens // tokens + count
    if splits is None:
        splits = chosen_splits(blocks * kv_heads, rows.longest, programs)
    outputs = torch.empty_like(query, memory_format=torch.contiguous_format)
    parts, logs = outputs, outputs
    if splits > 1:
        parts = torch.empty(num_tokens, heads, splits, dim, dtype=torch.float32, device=query.device)
        logs = torch.empty(num_tokens, heads, splits, dtype=torch.float32, device=query.device)
    sinks, cap = options.sinks, options.softcap
    window = _UNBOUNDED if options.sliding_window is None else options.sliding_window
    _attend[blocks, kv_heads, splits](
        query,
        query.stride(0),
        query.stride(1),
        keys,
        values,
        *keys.stride()[:3],
        rows.block_tables,
        rows.block_tables.stride(0),
        rows.starts,
        rows.lengths,
        count,
        outputs if sinks is None else sinks,
        parts,
        logs,
        splits,
        dim**-0.5 if options.scaling is None else options.scaling,
        window,
        1.0 if cap is None else cap,
        heads,
        PAGE=page_size,
        REPEATS=repeats,
        TOKENS=tokens,
        IS_DECODE=is_decode,
        IS_SPLIT=splits > 1,
        HAS_CAP=cap is not None,
        HAS_SINKS=sinks is not None,
        **block_sizes(lines, dim, query.dtype),
    )
    if splits > 1:
        _combine[(num_tokens * heads,)](parts, logs, outputs, splits, DIM=dim, WIDTH=padded_width(dim), SPLITS=_SPLITS)
    return outputs


def padded_width(dim: int) -> int:
    """Numbers of a head as blocks have them: a power of two."""
    return max(_LEAST_LINES, int(triton.next_power_of_2(dim)))


def block_sizes(lines: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Not tuned: tiles have room in the shared memory of every device. Three stages are the fewest in which Triton asks
    for the next tile's keys and values, whose places it must load first, while it multiplies this one's."""
    width = padded_width(dim)
    keys = max(_LEAST_LINES, min(_MOST_KEYS, _TILE_BYTES // (width * dtype.itemsize)))
    warps = 4 if lines * width <= 64 * 128 else 8
    return {"LINES": lines, "KEYS": keys, "DIM": dim, "WIDTH": width, "num_warps": warps, "num_stages": 3}


def chosen_splits(programs: int, longest: int, wanted: int) -> int:
    """Among how many programs a block's context of up to `longest` is divided, of a step that has `programs` without:
    1 if these fill the device, never so many that there is next to nothing for each, and always a power of two."""
    most = min(_MOST_SPLITS, wanted // programs, longest // _LEAST_SPLIT)
    return 1 << max(0, most.bit_length() - 1)


def kernels(device: torch.device) -> list[Callable[..., Tensor]]:
    """`attend` as it serves on this device, then as it has to be tried as well, for every variant to be compiled:
    with contexts that are and that are not divided."""
    programs = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return [partial(attend, programs=programs, splits=splits) for splits in (None, 1, 3)]
