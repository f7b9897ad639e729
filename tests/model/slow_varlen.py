"""What a kernel that reads pages has to compute, one token and head at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from server.model import VarlenRows


def slow_kernel(
    query: Tensor, keys: Tensor, values: Tensor, rows: VarlenRows, scale: float | None, window: tuple[int, int]
) -> Tensor:
    """See `server.model.varlen_attention.Kernel`."""
    output = torch.zeros_like(query)
    left, right = window
    size = keys.shape[1]
    repeats = query.shape[1] // keys.shape[2]
    starts, lengths, tables = rows.starts.tolist(), rows.lengths.tolist(), rows.block_tables.tolist()
    assert max(stop - start for start, stop in pairwise(starts)) <= rows.most_tokens
    assert max(lengths) <= rows.longest
    for table, length, start, stop in zip(tables, lengths, starts[:-1], starts[1:], strict=True):
        slots = torch.tensor([table[at // size] * size + at % size for at in range(length)])
        for token in range(start, stop):
            position = length - stop + token
            first = 0 if left < 0 else max(0, position - left)
            last = length if right < 0 else min(length, position + right + 1)
            for head in range(query.shape[1]):
                seen = slots[first:last]
                key, value = (part.flatten(0, 1)[seen, head // repeats].float() for part in (keys, values))
                scores = key @ query[token, head].float()
                weights = (scores * (query.shape[2] ** -0.5 if scale is None else scale)).softmax(0)
                output[token, head] = (weights @ value).to(output.dtype)
    return output


def multiplying_kernel(
    query: Tensor, keys: Tensor, values: Tensor, rows: VarlenRows, scale: float | None, window: tuple[int, int]
) -> Tensor:
    """Right as long as pages are finite: it gives what a token does not see the weight 0, and multiplies by it."""
    left, right = window
    repeats = query.shape[1] // keys.shape[2]
    output = torch.empty_like(query)
    for table, length, (start, stop) in zip(
        rows.block_tables, rows.lengths.tolist(), pairwise(rows.starts.tolist()), strict=True
    ):
        pages = table[: -(-length // keys.shape[1])].long()
        key, value = (part[pages].flatten(0, 1).repeat_interleave(repeats, 1).float() for part in (keys, values))
        position = torch.arange(length - (stop - start), length)[:, None]
        at = torch.arange(len(key))
        unseen = at >= length
        if left >= 0:
            unseen = unseen | (at < position - left)
        if right >= 0:
            unseen = unseen | (at > position + right)
        scores = torch.einsum("qhd,khd->hqk", query[start:stop].float(), key)
        weights = (scores * (query.shape[2] ** -0.5 if scale is None else scale)).masked_fill(unseen, -torch.inf)
        output[start:stop] = torch.einsum("hqk,khd->qhd", weights.softmax(-1), value).to(output.dtype)
    return output
