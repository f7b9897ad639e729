"""Attention of a packed step over KV pages, behind `transformers`' attention interface.

All rows of a step lie one behind the other in one sequence `[1, num_tokens]`. In each layer the step's keys
and values are written into the pages first; then every row attends to its own pages. So a row may also read
what another row of the same step has just written: that is how requests share a prefix in the step that
computes it.

The registered function looks for an `Attention` in the keyword arguments that the model passes through; the
model's own module, unmodified, calls it. What a model passes that is not honoured here is found by the probe
(`server.model.probe`) and refuses the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from server.model.kv_cache import KVCache

IMPLEMENTATION = "medley"


@dataclass(frozen=True)
class AttentionOptions:
    """What the model's class asks of one call, beyond queries, keys and values."""

    scaling: float | None  # factor on the scores; None: 1/√head_dim
    sliding_window: int | None = None  # positions that a token sees, itself included
    softcap: float | None = None  # scores become softcap · tanh(scores / softcap)
    sinks: Tensor | None = None  # [heads], one more score in each softmax, without a value


class Attention(Protocol):
    """What the registered function calls, once per layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """`query` `[num_tokens, heads, head_dim]`, `key` and `value` `[num_tokens, kv_heads, head_dim]`;
        returns `[num_tokens, heads, head_dim]`."""
        ...


def _attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    medley_attention: Attention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_checked_by_the_probe: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention signature: tensors `[1, heads, num_tokens, head_dim]` in, tokens first out."""
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    layer: int = module.layer_idx  # type: ignore[assignment]
    output = medley_attention.attend(
        layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), options
    )
    return output[None], None


AttentionInterface.register(IMPLEMENTATION, _attention_function)


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one token each, of like context length, that attend in one call."""

    tokens: Tensor  # [rows], their index in the packed step
    block_tables: Tensor  # [rows, pages], padded with the null page
    lengths: Tensor  # [rows], context length, the token itself included


@dataclass(frozen=True)
class PrefillRow:
    """A row of several tokens, at the end of its context."""

    start: int  # its tokens in the packed step
    stop: int
    block_table: Tensor  # [pages]
    length: int  # context length, the row's tokens included


@dataclass(frozen=True)
class AttentionPlan:
    """Where a step's keys and values go, and what each row sees. Built once per step, read by every layer."""

    slots: Tensor  # [writes], cache slots
    sources: Tensor | None  # [writes], token of each slot; None: token i to slots[i]
    decode: list[DecodeGroup]
    prefill: list[PrefillRow]


@dataclass
class PagedAttention:
    """One step's attention over a KV cache."""

    cache: KVCache
    plan: AttentionPlan
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `Attention`."""
        plan = self.plan
        if plan.sources is not None:
            self.cache.write(layer, plan.slots, key[plan.sources], value[plan.sources])
        else:
            self.cache.write(layer, plan.slots, key, value)
        output = torch.empty_like(query)
        pages = self.cache.layers[layer]
        for index, group in enumerate(plan.decode):
            mask = self._decode_mask(index, group, options.sliding_window)
            output[group.tokens] = _decode(query[group.tokens], pages, group, mask, options)
        for row in plan.prefill:
            output[row.start : row.stop] = _prefill(query[row.start : row.stop], pages, row, options)
        return output

    def _decode_mask(self, index: int, group: DecodeGroup, window: int | None) -> Tensor:
        """`[rows, context]`, True where the row's token looks; the same in every layer of the step."""
        mask = self._masks.get((index, window))
        if mask is None:
            positions = torch.arange(group.block_tables.shape[1] * self.cache.page_size, device=group.lengths.device)
            mask = positions < group.lengths[:, None]
            if window is not None:
                mask &= positions >= group.lengths[:, None] - window
            self._masks[index, window] = mask
        return mask


def _decode(query: Tensor, pages: Tensor, group: DecodeGroup, mask: Tensor, options: AttentionOptions) -> Tensor:
    """One token per row. `query` `[rows, heads, head_dim]`; the query heads that share a KV head stand as
    that head's query tokens, so that keys and values are never repeated."""
    rows, heads, head_dim = query.shape
    kv_heads = pages.shape[-2]
    gathered = pages.index_select(1, group.block_tables.flatten())
    keys, values = gathered.view(2, rows, -1, kv_heads, head_dim).transpose(2, 3)  # [rows, kv_heads, context, dim]
    grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
    sinks = None if options.sinks is None else options.sinks.view(1, kv_heads, heads // kv_heads, 1)
    output = _weighted_values(grouped, keys, values, mask[:, None, None], options, sinks)
    return output.reshape(rows, heads, head_dim)


def _prefill(query: Tensor, pages: Tensor, row: PrefillRow, options: AttentionOptions) -> Tensor:
    """Several tokens of one row. `query` `[tokens, heads, head_dim]`."""
    tokens, heads, head_dim = query.shape
    kv_heads = pages.shape[-2]
    keys, values = pages.index_select(1, row.block_table).flatten(1, 2)[:, : row.length].transpose(1, 2)
    position = torch.arange(row.length - tokens, row.length, device=query.device)[:, None]
    context = torch.arange(row.length, device=query.device)
    mask = context <= position
    if options.sliding_window is not None:
        mask &= context > position - options.sliding_window
    # [kv_heads, heads per KV head · tokens, dim]: as in `_decode`, KV heads are not repeated
    grouped = query.transpose(0, 1).reshape(kv_heads, -1, head_dim)
    repeats = heads // kv_heads
    sinks = None
    if options.sinks is not None:
        sinks = options.sinks.repeat_interleave(tokens).view(1, kv_heads, repeats * tokens, 1)
    output = _weighted_values(
        grouped[None], keys[None], values[None], mask.repeat(repeats, 1)[None, None], options, sinks
    )
    return output.view(heads, tokens, head_dim).transpose(0, 1)


def _weighted_values(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    options: AttentionOptions,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(scaling · q kᵀ) v, with the class's cap and sinks. All `[rows, heads, tokens, dim]`."""
    if options.softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=options.scaling)
    scaling = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = (query @ keys.transpose(-1, -2)).float() * scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[-2]]
    return weights.to(values.dtype) @ values
