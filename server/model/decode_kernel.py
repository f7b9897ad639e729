"""Attention of one token per row over KV pages where they lie: compiled, for CPUs, in float32.

torch's attention wants the pages of a row side by side, and copying them there costs more than attending: a row's keys
and values are then read from memory, written and read again. Here they are read once. Rows, or where there are few of
them shares of their heads, are taken one after the other by whichever thread is free. Pages lie anywhere in memory, so
the processor cannot know which comes next: while one is read, the kernel asks for the next.
"""

from __future__ import annotations

import ctypes
from struct import Struct
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from server.model.attention import AttentionOptions, AttentionPlan, DecodeGroup
from server.model.compiled import COMPILED, TorchThreads, call_at, floats, integers, prefetch, take_unit

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
    "num_tokens",
    "heads",
    "kv_heads",
    "head_dim",
    "page_size",
    "num_pages",
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
    "scaling",  # this and the next are float32
    "softcap",  # 0: none
)
_RECORD = Struct(f"{len(_FIELDS) - 2}q2f")
_CALL = np.dtype([(name, np.int64) for name in _FIELDS[:-2]] + [(name, np.float32) for name in _FIELDS[-2:]])
_WRITTEN = 8 * _FIELDS.index("written")  # bytes from the record's beginning
_MANY_ROWS = 16  # from here on whole rows keep all threads busy to the end
_LINE = 16  # numbers of a cache line
_CALL_POINTER = types.CPointer(numba.from_dtype(_CALL))


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _fetch(ahead: Any, token: int, kv_head: int, page: Any) -> None:
    """Ask for the same token and head of another page, whose address is `ahead`."""
    _, kv_heads, head_dim = page.shape
    for at in range(0, head_dim, _LINE):
        prefetch(ahead + 4 * ((token * kv_heads + kv_head) * head_dim + at))


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _score(first: int, stop: int, query: Any, keys: Any, ahead: Any, scores: Any, scaling: Any, softcap: Any) -> None:
    """scaling · q kᵀ, capped, for KV heads from the first on and the tokens of a page: `scores` `[heads, tokens]`."""
    tokens, kv_heads, head_dim = keys.shape
    repeats = query.shape[0] // kv_heads
    for token in range(tokens):
        for kv_head in range(first, stop):
            _fetch(ahead, token, kv_head, keys)
            for head in range(kv_head * repeats, (kv_head + 1) * repeats):
                score = np.float32(0)
                for at in range(head_dim):
                    score += query[head, at] * keys[token, kv_head, at]
                scores[head, token] = score * scaling
                if softcap > 0:
                    scores[head, token] = softcap * np.tanh(score * scaling / softcap)


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _softmax(scores: Any, sink: Any) -> None:
    """In place over `scores` `[seen]` and one more that is not kept."""
    largest = sink
    for score in scores:
        largest = max(largest, score)
    total = np.exp(sink - largest)
    for at in range(len(scores)):
        scores[at] = np.exp(scores[at] - largest)
        total += scores[at]
    scores *= np.float32(1) / total


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _add_values(first: int, stop: int, weights: Any, values: Any, ahead: Any, output: Any) -> None:
    """Add the weighted values of a page's tokens: `weights` `[heads, tokens]`, `output` `[heads, head_dim]`."""
    tokens, kv_heads, head_dim = values.shape
    repeats = output.shape[0] // kv_heads
    for token in range(tokens):
        for kv_head in range(first, stop):
            _fetch(ahead, token, kv_head, values)
            for head in range(kv_head * repeats, (kv_head + 1) * repeats):
                weight = weights[head, token]
                for at in range(head_dim):
                    output[head, at] += weight * values[token, kv_head, at]


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _write(call: Any, counter: Any) -> None:
    """The step's keys and values into their slots."""
    count, width = call.count, call.kv_heads * call.head_dim
    slots = carray(integers(call.slots), count)
    keys, values = carray(floats(call.new_keys), (count, width)), carray(floats(call.new_values), (count, width))
    token = take_unit(counter)
    while token < count:
        place = 4 * width * slots[token]
        key, value = carray(floats(call.keys + place), width), carray(floats(call.values + place), width)
        for at in range(width):
            key[at] = keys[token, at]
        for at in range(width):
            value[at] = values[token, at]
        token = take_unit(counter)


@cfunc(types.void(_CALL_POINTER), **COMPILED)  # type: ignore[untyped-decorator]
def _write_and_attend(pointer: Any) -> None:
    """What each thread runs: tokens to be written, and when all are, shares of rows, as long as there are any."""
    calls = carray(pointer, 1)
    call = calls[0]
    _write(call, integers(calls.ctypes.data + _WRITTEN))
    call_at(call.barrier)
    rows, heads, head_dim, size = call.rows, call.heads, call.head_dim, call.page_size
    repeats = heads // call.kv_heads
    page_bytes = 4 * size * call.kv_heads * head_dim
    page_shape = (call.num_pages, size, call.kv_heads, head_dim)
    keys, values = carray(floats(call.keys), page_shape), carray(floats(call.values), page_shape)
    lengths, tokens = carray(integers(call.lengths), rows), carray(integers(call.tokens), rows)
    tables = carray(integers(call.tables), (rows, call.table_width))
    queries = carray(floats(call.query), (call.num_tokens, heads, head_dim))
    output = carray(floats(call.output), (call.num_tokens, heads, head_dim))
    scores = np.empty((heads, size * call.table_width), np.float32)
    share = take_unit(pointer)
    while share < rows * call.shares:
        row, part = share // call.shares, share % call.shares
        heads_from, heads_to = part * call.kv_heads // call.shares, (part + 1) * call.kv_heads // call.shares
        token, length, pages = tokens[row], lengths[row], tables[row]
        first = max(0, length - call.window) if call.window > 0 else 0
        begin, last = first // size, (length - 1) // size
        first_values = call.values + page_bytes * pages[begin]
        for place in range(begin, last + 1):
            start, stop = max(first, place * size), min(length, (place + 1) * size)
            page = keys[pages[place], start - place * size : stop - place * size]
            ahead = call.keys + page_bytes * pages[place + 1] if place < last else first_values
            _score(heads_from, heads_to, queries[token], page, ahead, scores[:, start:stop], call.scaling, call.softcap)
        for head in range(heads_from * repeats, heads_to * repeats):
            sink = floats(call.sinks)[head] if call.sinks != 0 else np.float32(-np.inf)
            _softmax(scores[head, first:length], sink)
            output[token, head] = 0
        likely = min(call.taken, rows * call.shares - 1)  # what comes next, unless another thread takes it
        next_row, next_part = likely // call.shares, likely % call.shares
        next_place = max(0, lengths[next_row] - call.window) // size if call.window > 0 else 0
        next_keys = call.keys + page_bytes * tables[next_row, next_place]
        next_keys += 4 * head_dim * (next_part * call.kv_heads // call.shares - heads_from)
        for place in range(begin, last + 1):
            start, stop = max(first, place * size), min(length, (place + 1) * size)
            page = values[pages[place], start - place * size : stop - place * size]
            ahead = call.values + page_bytes * pages[place + 1] if place < last else next_keys
            _add_values(heads_from, heads_to, scores[:, start:stop], page, ahead, output[token])
        share = take_unit(pointer)


# Of a step without rows that decode, whose keys and values are to be written too.
_NOBODY = DecodeGroup(0, 0, torch.empty(0, 1, dtype=torch.long), torch.empty(0, dtype=torch.long))


class DecodeKernel:
    """See the module. Used by one thread at a time."""

    def __init__(self) -> None:
        """Raises `OSError` where torch has not loaded GNU OpenMP."""
        self._threads = TorchThreads()
        self._call = ctypes.create_string_buffer(_RECORD.size)
        self._address = ctypes.addressof(self._call)

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
        num_tokens, heads, head_dim = query.shape
        _, num_pages, page_size, kv_heads, _ = pages.shape
        new_keys, new_values = (each.contiguous() for each in plan.written(key, value))
        query, slots, sinks = query.contiguous(), plan.slots, options.sinks
        count = len(slots)
        for group in plan.decode or [_NOBODY]:
            tables, lengths = group.block_tables.long().contiguous(), group.lengths.long()
            rows, table_width = tables.shape
            shares = 1 if rows >= _MANY_ROWS else kv_heads
            _RECORD.pack_into(
                self._call,
                0,
                0,
                0,
                count,
                slots.data_ptr(),
                new_keys.data_ptr(),
                new_values.data_ptr(),
                self._threads.barrier,
                rows,
                shares,
                num_tokens,
                heads,
                kv_heads,
                head_dim,
                page_size,
                num_pages,
                table_width,
                options.sliding_window or 0,
                query.data_ptr(),
                pages.data_ptr(),
                pages.data_ptr() + pages.stride(0) * pages.itemsize,
                tables.data_ptr(),
                lengths.data_ptr(),
                plan.decode_tokens.data_ptr() + group.start * plan.decode_tokens.itemsize,
                output.data_ptr(),
                0 if sinks is None else sinks.data_ptr(),
                head_dim**-0.5 if options.scaling is None else options.scaling,
                options.softcap or 0,
            )
            self._threads.run(_write_and_attend, self._address, max(count, rows * shares))
            count = 0  # they are there
