"""Attention of one token per row over KV pages where they lie: compiled, for CPUs, in float32.

torch's attention wants the pages of a row side by side, and copying them there costs more than attending: a row's keys
and values are then read from memory, written and read again. Here they are read once. Rows, or where there are few of
them shares of their heads, are taken one after the other by whichever thread is free. Pages lie anywhere in memory, so
the processor cannot know which comes next: while one is read, the kernel asks for the next.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from server.model.attention import AttentionOptions, AttentionPlan, DecodeGroup
from server.model.compiled import call_address, exponential, floats, inlined, integers, kernel, take_unit
from server.model.head_products import add_tokens, score_tokens
from server.model.threads import TorchThreads

_FIELDS = (
    "taken",  # shares of rows
    "written",  # tokens
    "count",  # of tokens to be written
    "slots",  # where each goes; this and every other field that is named as a tensor: its address
    "new_keys",
    "new_values",
    "barrier",  # address of the function in which all threads wait for each other
    "rows",
    "shares",  # of a row's KV heads
    "heads",
    "kv_heads",
    "head_dim",
    "page_size",
    "table_width",
    "window",  # 0: none
    "query",
    "keys",
    "values",
    "tables",
    "lengths",
    "tokens",
    "output",
    "sinks",  # 0: none
)

ATTENTION = np.dtype([(name, np.int64) for name in _FIELDS] + [("scaling", np.float32), ("softcap", np.float32)])
"""What one layer's attention is told. A softcap of 0 is none."""
Arguments = dict[str, Any]  # of such a record, by name: numbers
_WRITTEN = 8 * _FIELDS.index("written")  # bytes from the record's beginning
_NOTHING = np.float32(-80)  # its exponential is nothing beside 1
_MANY_ROWS = 16  # from here on whole rows keep all threads busy to the end
_CALL_POINTER = types.CPointer(numba.from_dtype(ATTENTION))


@inlined
def _softmax(scores: Any, scaling: Any, softcap: Any, sink: Any) -> None:
    """In place over `scores` `[seen]`, scaled and capped before, and one more that is not kept."""
    largest = sink
    for at in range(len(scores)):
        score = scaling * scores[at]
        scores[at] = softcap * np.tanh(score / softcap) if softcap > 0 else score
        largest = max(largest, scores[at])
    total = exponential(sink - largest)
    for at in range(len(scores)):
        below = scores[at] - largest
        scores[at] = np.float32(0) if below < _NOTHING else exponential(below)  # products with less are slow: denormal
        total += scores[at]
    scores *= np.float32(1) / total


@inlined
def write_token(call: Any, unit: int) -> None:
    """One of the step's keys and values into its slot."""
    width = call.kv_heads * call.head_dim
    source, target = 4 * width * unit, 4 * width * integers(call.slots)[unit]
    keys, values = carray(floats(call.keys + target), width), carray(floats(call.values + target), width)
    keys[:] = carray(floats(call.new_keys + source), width)
    values[:] = carray(floats(call.new_values + source), width)


@inlined
def attend_share(call: Any, unit: int, likely: int) -> None:
    """A share of a row's heads. `likely` is the unit that this thread will have next, unless another takes it."""
    rows, heads, width, size = call.rows, call.heads, call.head_dim, call.page_size
    repeats, stride = heads // call.kv_heads, 4 * call.kv_heads * call.head_dim  # bytes from token to token
    lengths, tokens = carray(integers(call.lengths), rows), carray(integers(call.tokens), rows)
    tables = carray(integers(call.tables), (rows, call.table_width))
    row, part = unit // call.shares, unit % call.shares
    heads_from, heads_to = part * call.kv_heads // call.shares, (part + 1) * call.kv_heads // call.shares
    length, pages, first_head = lengths[row], tables[row], 4 * heads * width * tokens[row]
    first = max(0, length - call.window) if call.window > 0 else 0
    begin, last = first // size, (length - 1) // size
    scores = np.empty(((heads_to - heads_from) * repeats, length), np.float32)
    first_values = call.values + stride * size * pages[begin]
    for place in range(begin, last + 1):
        start, stop = max(first, place * size), min(length, (place + 1) * size)
        page = call.keys + stride * (size * pages[place] + start - place * size)
        ahead = call.keys + stride * size * pages[place + 1] if place < last else first_values
        for head in range(heads_from * repeats, heads_to * repeats):
            at = 4 * width * (head // repeats)
            into = scores.ctypes.data + 4 * ((head - heads_from * repeats) * length + start)
            query = call.query + first_head + 4 * width * head
            score_tokens(query, page + at, stride, stop - start, width, into, ahead + at)
    for head in range(heads_from * repeats, heads_to * repeats):
        sink = floats(call.sinks)[head] if call.sinks != 0 else np.float32(-np.inf)
        _softmax(scores[head - heads_from * repeats, first:length], call.scaling, call.softcap, sink)
        output = carray(floats(call.output + first_head + 4 * width * head), width)
        output[:] = 0
    next_row, next_part = likely // call.shares, likely % call.shares
    next_place = max(0, lengths[next_row] - call.window) // size if call.window > 0 else 0
    next_keys = call.keys + stride * size * tables[next_row, next_place]
    next_keys += 4 * width * (next_part * call.kv_heads // call.shares - heads_from)
    for place in range(begin, last + 1):
        start, stop = max(first, place * size), min(length, (place + 1) * size)
        page = call.values + stride * (size * pages[place] + start - place * size)
        ahead = call.values + stride * size * pages[place + 1] if place < last else next_keys
        for head in range(heads_from * repeats, heads_to * repeats):
            at = 4 * width * (head // repeats)
            weights = scores.ctypes.data + 4 * ((head - heads_from * repeats) * length + start)
            output_at = call.output + first_head + 4 * width * head
            add_tokens(output_at, page + at, stride, stop - start, width, weights, ahead + at)


@kernel(_CALL_POINTER)
def _write_and_attend(pointer: Any) -> None:
    """What each thread runs: tokens to be written, and when all are, shares of rows, as long as there are any."""
    calls = carray(pointer, 1)
    call = calls[0]
    counter = integers(calls.ctypes.data + _WRITTEN)
    unit = take_unit(counter)
    while unit < call.count:
        write_token(call, unit)
        unit = take_unit(counter)
    call_address(call.barrier)
    count = call.rows * call.shares
    unit = take_unit(pointer)
    while unit < count:
        attend_share(call, unit, min(call.taken, count - 1))
        unit = take_unit(pointer)


# Of a step without rows that decode, whose keys and values are to be written too.
_NOBODY = DecodeGroup(0, 0, torch.empty(0, 1, dtype=torch.long), torch.empty(0, dtype=torch.long))


def layer_fields(query: Tensor, keys: Tensor, values: Tensor, output: Tensor, options: AttentionOptions) -> Arguments:
    """What a layer gives and wants: contiguous tensors `[tokens or more, heads or kv_heads, head_dim]`, of which `keys`
    and `values` are to be written."""
    _, heads, head_dim = query.shape
    return {
        "heads": heads,
        "kv_heads": keys.shape[1],
        "head_dim": head_dim,
        "query": query.data_ptr(),
        "new_keys": keys.data_ptr(),
        "new_values": values.data_ptr(),
        "output": output.data_ptr(),
        "window": options.sliding_window or 0,
        "sinks": 0 if options.sinks is None else options.sinks.data_ptr(),
        "scaling": head_dim**-0.5 if options.scaling is None else options.scaling,
        "softcap": options.softcap or 0,
    }


def page_fields(pages: Tensor) -> Arguments:
    """A layer of the cache, `[2, pages, page_size, kv_heads, head_dim]`."""
    keys, values = pages.unbind()
    page_size = pages.shape[2]
    return {
        "page_size": page_size,
        "keys": keys.data_ptr(),
        "values": values.data_ptr(),
    }


def row_fields(plan: AttentionPlan, group: DecodeGroup, kv_heads: Any) -> tuple[Arguments, object]:
    """The rows that decode, and where what they give goes; `kv_heads` may be a number for each of several layers. With
    them what the caller must keep as long as they are used."""
    tables, lengths, slots, tokens = (
        each.long().contiguous() for each in (group.block_tables, group.lengths, plan.slots, plan.decode_tokens)
    )
    fields = {
        "rows": len(tables),
        "shares": 1 if len(tables) >= _MANY_ROWS else kv_heads,
        "count": len(slots),
        "slots": slots.data_ptr(),
        "table_width": tables.shape[1],
        "tables": tables.data_ptr(),
        "lengths": lengths.data_ptr(),
        "tokens": tokens.data_ptr() + group.start * tokens.itemsize,
    }
    return fields, (tables, lengths, slots, tokens)


class DecodeKernel:
    """See the module. Used by one thread at a time."""

    def __init__(self) -> None:
        """Raises `OSError` where torch has not loaded GNU OpenMP."""
        self._threads = TorchThreads()
        self._call = np.zeros(1, ATTENTION)

    def __call__(
        self,
        pages: Tensor,
        plan: AttentionPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        output: Tensor,
    ) -> None:
        """Write the step's keys and values, as `KVCache.write` does, and fill the rows of `output` that decode.

        `pages` is a layer of the cache, `[2, pages, page_size, kv_heads, head_dim]`; the others are as in `Attention`,
        `output` contiguous; all float32 on the CPU.
        """
        query = query.contiguous()
        new_keys, new_values = (each.contiguous() for each in plan.written(key, value))
        fields = layer_fields(query, new_keys, new_values, output, options) | page_fields(pages)
        fields["barrier"] = self._threads.barrier
        call = self._call
        for index, group in enumerate(plan.decode or [_NOBODY]):
            rows, _kept = row_fields(plan, group, new_keys.shape[1])
            fields |= rows | {"taken": 0, "written": 0}
            if index:
                fields["count"] = 0  # they are there
            for name, number in fields.items():
                call[name] = number
            pieces = max(int(fields["count"]), int(fields["rows"] * fields["shares"]))
            self._threads.run(_write_and_attend, call.ctypes.data, pieces)
