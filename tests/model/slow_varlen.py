"""What a kernel that reads pages has to compute, one token and head at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from server.model import VarlenRows
from server.model.attention import AttentionOptions


def slow_kernel(query: Tensor, keys: Tensor, values: Tensor, rows: VarlenRows, options: AttentionOptions) -> Tensor:
    """See `server.model.varlen_attention.Kernel`."""
    output = torch.zeros_like(query)
    scale = query.shape[2] ** -0.5 if options.scaling is None else options.scaling
    size = keys.shape[1]
    repeats = query.shape[1] // keys.shape[2]
    starts, lengths, tables = rows.starts.tolist(), rows.lengths.tolist(), rows.block_tables.tolist()
    assert max(stop - start for start, stop in pairwise(starts)) <= rows.most_tokens
    assert max(lengths) <= rows.longest
    for table, length, start, stop in zip(tables, lengths, starts[:-1], starts[1:], strict=True):
        slots = torch.tensor([table[at // size] * size + at % size for at in range(length)], device=query.device)
        for token in range(start, stop):
            position = length - stop + token
            first = 0 if options.sliding_window is None else max(0, position + 1 - options.sliding_window)
            seen = slots[first : position + 1]
            for head in range(query.shape[1]):
                key, value = (part.flatten(0, 1)[seen, head // repeats].double() for part in (keys, values))
                scores = key @ query[token, head].double() * scale
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                if options.sinks is not None:
                    scores = torch.cat([scores, options.sinks[head : head + 1].double()])
                output[token, head] = (scores.softmax(0)[: len(seen)] @ value).to(output.dtype)
    return output


def multiplying_kernel(
    query: Tensor, keys: Tensor, values: Tensor, rows: VarlenRows, options: AttentionOptions
) -> Tensor:
    """Right as long as pages are finite: it gives what a token does not see the weight 0, and multiplies by it."""
    repeats = query.shape[1] // keys.shape[2]
    output = torch.empty_like(query)
    for table, length, (start, stop) in zip(
        rows.block_tables, rows.lengths.tolist(), pairwise(rows.starts.tolist()), strict=True
    ):
        pages = table[: -(-length // keys.shape[1])].long()
        key, value = (part[pages].flatten(0, 1).repeat_interleave(repeats, 1).float() for part in (keys, values))
        position = torch.arange(length - (stop - start), length)[:, None]
        at = torch.arange(len(key))
        unseen = at > position
        if options.sliding_window is not None:
            unseen = unseen | (at <= position - options.sliding_window)
        scores = torch.einsum("qhd,khd->hqk", query[start:stop].float(), key)
        weights = (scores * (query.shape[2] ** -0.5 if options.scaling is None else options.scaling)).masked_fill(
            unseen, -torch.inf
        )
        output[start:stop] = torch.einsum("hqk,khd->qhd", weights.softmax(-1), value).to(output.dtype)
    return output
