"""Paged attention against one softmax per token and head."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from server.model import AttentionPlan, DecodeGroup, KVCache, LayerShape, PagedAttention, PrefillRow
from server.model.attention import AttentionOptions
from server.model.decode_kernel import DecodeKernel


@dataclass
class Context:
    """A row: its whole context's keys and values `[length, kv_heads, dim]`, of which the last `count` are new."""

    keys: Tensor
    values: Tensor
    count: int
    pages: list[int]


def _slow(query: Tensor, context: Context, options: AttentionOptions) -> Tensor:
    """`query` `[count, heads, dim]`."""
    length, kv_heads, dim = context.keys.shape
    heads = query.shape[1]
    scaling = 1 / math.sqrt(dim) if options.scaling is None else options.scaling
    output = torch.zeros_like(query)
    for token in range(context.count):
        position = length - context.count + token
        first = 0 if options.sliding_window is None else max(0, position - options.sliding_window + 1)
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = context.keys[first : position + 1, kv] @ query[token, head] * scaling
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.sinks is not None:
                scores = torch.cat([scores, options.sinks[head : head + 1]])
            weights = scores.softmax(0)[: position + 1 - first]
            output[token, head] = weights @ context.values[first : position + 1, kv]
    return output


def _plan(contexts: list[Context], page_size: int, rng: random.Random) -> AttentionPlan:
    slots: list[int] = []
    prefill, decode = [], []
    at = 0
    for context in contexts:
        length = len(context.keys)
        positions = range(length - context.count, length)
        slots += [context.pages[position // page_size] * page_size + position % page_size for position in positions]
        if context.count == 1 and rng.random() < 0.8:
            decode.append((at, context.pages, length))
        else:
            prefill.append(PrefillRow(at, at + context.count, torch.tensor(context.pages), length))
        at += context.count
    rng.shuffle(decode)
    cut = rng.randint(0, len(decode))
    groups = []
    for start, stop in ((0, cut), (cut, len(decode))):
        rows = decode[start:stop]
        if rows:
            width = max(len(pages) for _, pages, _ in rows)
            groups.append(
                DecodeGroup(
                    start=start,
                    stop=stop,
                    block_tables=torch.tensor([pages + [0] * (width - len(pages)) for _, pages, _ in rows]),
                    lengths=torch.tensor([length for _, _, length in rows]),
                )
            )
    return AttentionPlan(torch.tensor(slots), None, torch.tensor([token for token, _, _ in decode]), groups, prefill)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("is_compiled", "threads"), [(False, 2), (True, 1), (True, 2), (True, 4)], indirect=["threads"]
)
def test_paged_attention_is_one_softmax_per_token_and_head(
    window: int | None, softcap: float | None, with_sinks: bool, is_compiled: bool
) -> None:
    # heads of less than a vector, of one, of several that are summed at once, and of some more
    for seed, dim in enumerate((4, 16, 64, 72, 80, 128)):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        kv_heads, repeats = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
        page_size = rng.choice([1, 4, 7])
        heads = kv_heads * repeats
        cache = KVCache([LayerShape(kv_heads, dim)], 80, page_size, dtype=torch.float32, device=torch.device("cpu"))
        cache.layers[0][:, 1:] = torch.nan  # pages of others, and of nobody
        free = list(range(1, 80))
        rng.shuffle(free)
        contexts = []
        for _ in range(rng.randint(1, 6)):
            length = rng.randint(1, 12)
            pages = [free.pop() for _ in range(-(-length // page_size))]
            cache.zero(pages)
            keys, values = torch.randn(2, length, kv_heads, dim)
            count = rng.choice([1, 1, rng.randint(1, length)])
            contexts.append(Context(keys, values, count, pages))
            for position in range(length - count):
                slot = torch.tensor([pages[position // page_size] * page_size + position % page_size])
                cache.write(0, slot, keys[position : position + 1], values[position : position + 1])
        sinks = torch.randn(heads) if with_sinks else None
        options = AttentionOptions(rng.choice([None, 0.7]), window, softcap, sinks)
        query = torch.randn(sum(context.count for context in contexts), heads, dim)
        kernel = DecodeKernel() if is_compiled else None
        attention = PagedAttention(cache, _plan(contexts, page_size, rng), decode_kernel=kernel)
        output = attention.attend(
            0,
            query,
            torch.cat([context.keys[-context.count :] for context in contexts]),
            torch.cat([context.values[-context.count :] for context in contexts]),
            options,
        )
        rows = torch.split(query, [context.count for context in contexts])
        expected = torch.cat([_slow(row, context, options) for row, context in zip(rows, contexts, strict=True)])
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def test_the_null_page_is_zero_from_the_start() -> None:
    held = [torch.full((2, 40, 4, 2, 8), torch.nan) for _ in range(8)]
    del held
    cache = KVCache([LayerShape(2, 8)] * 4, 40, 4, dtype=torch.float32, device=torch.device("cpu"))
    assert all(bool((layer[:, 0] == 0).all()) for layer in cache.layers)


@pytest.mark.usefixtures("threads")
def test_a_row_whose_keys_are_not_finite_hurts_nobody_else() -> None:
    cache = KVCache([LayerShape(2, 8)], 4, 4, dtype=torch.float32, device=torch.device("cpu"))
    cache.zero([1, 2, 3])
    groups = [DecodeGroup(0, 3, torch.tensor([[1], [2], [3]]), torch.tensor([1, 1, 1]))]
    plan = AttentionPlan(torch.tensor([4, 8, 12]), None, torch.tensor([0, 1, 2]), groups, [])
    query, key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    key[1] = torch.nan
    output = PagedAttention(cache, plan, decode_kernel=DecodeKernel()).attend(
        0, query, key, value, AttentionOptions(None)
    )
    assert output[1].isnan().all()
    torch.testing.assert_close(output[[0, 2]], value[[0, 2]])
