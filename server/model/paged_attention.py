"""Attention over pages on every device, in every data type, with everything that a class may ask for
(`AttentionOptions`): each row's pages are copied side by side for torch's own attention. On a CPU, pages of rows of one
token are read where they lie, by a kernel of ours (`server.model.decode_kernel`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from server.model.attention import Attention, AttentionOptions, AttentionPlan, DecodeGroup, PrefillRow
from server.model.kv_cache import KVCache

if TYPE_CHECKING:
    from server.model.decode_kernel import DecodeKernel


@dataclass
class PagedAttention:
    """One step's attention over a KV cache."""

    cache: KVCache
    plan: AttentionPlan
    has_causal_kernel: bool = False  # whether torch's attention is faster told `is_causal` than given a mask
    decode_kernel: DecodeKernel | None = None
    _masks: dict[tuple[DecodeGroup | PrefillRow, int | None], Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `Attention`."""
        plan = self.plan
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if self.decode_kernel is not None:
            self.decode_kernel(self.cache.layers[layer], plan, query, key, value, options, output)
        else:
            self.cache.write(layer, plan.slots, *plan.written(key, value))
            if plan.decode:
                decoded = query.index_select(0, plan.decode_tokens)  # overwritten group by group
                for group in plan.decode:
                    self._decode(layer, decoded[group.start : group.stop], group, options)
                output.index_copy_(0, plan.decode_tokens, decoded)
        for row in plan.prefill:
            tokens = slice(row.start, row.stop)
            output[tokens] = self._prefill(layer, query[tokens], key[tokens], value[tokens], row, options)
        return output

    def _decode(self, layer: int, query: Tensor, group: DecodeGroup, options: AttentionOptions) -> None:
        """One token per row, in place on `query` `[rows, heads, head_dim]`. The query heads that share a KV head stand
        as that head's query tokens, so that keys and values are never repeated."""
        rows, heads, head_dim = query.shape
        keys, values = (
            part.view(rows, -1, *part.shape[2:]).transpose(1, 2)  # [rows, kv_heads, context, head_dim]
            for part in self.cache.gather(layer, group.block_tables.flatten())
        )
        kv_heads = keys.shape[1]
        grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
        sinks = None if options.sinks is None else options.sinks.view(1, kv_heads, heads // kv_heads, 1)
        mask = self._decode_mask(group, options.sliding_window, query.dtype)
        query.copy_(_weighted_values(grouped, keys, values, mask, options, sinks).view(rows, heads, head_dim))

    def _decode_mask(self, group: DecodeGroup, window: int | None, dtype: torch.dtype) -> Tensor:
        """`[rows, 1, 1, context]`, 0 where the row's token looks, else -inf; the same in every layer of the step."""
        mask = self._masks.get((group, window))
        if mask is None:
            length = group.lengths[:, None]
            positions = torch.arange(group.block_tables.shape[1] * self.cache.page_size, device=length.device)
            seen = positions < length
            if window is not None:
                seen &= positions >= length - window
            mask = self._masks[group, window] = _additive(seen, dtype)[:, None, None]
        return mask

    def _prefill(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, row: PrefillRow, options: AttentionOptions
    ) -> Tensor:
        """Several tokens of one row. `query` `[tokens, heads, head_dim]`; `key` and `value` are the row's own."""
        tokens, heads, head_dim = query.shape
        if row.length > tokens:
            key, value = (part.flatten(0, 1)[: row.length] for part in self.cache.gather(layer, row.block_table))
        elif self.has_causal_kernel and options == AttentionOptions(options.scaling):
            return _whole_prompt(query, key, value, options.scaling)
        kv_heads = key.shape[1]
        repeats = heads // kv_heads
        sinks = None
        if options.sinks is not None:
            sinks = options.sinks.repeat_interleave(tokens).view(1, kv_heads, repeats * tokens, 1)
        # [kv_heads, heads per KV head · tokens, head_dim]: as in `_decode`, KV heads are not repeated
        grouped = query.transpose(0, 1).reshape(1, kv_heads, repeats * tokens, head_dim)
        mask = self._prefill_mask(row, tokens, options.sliding_window, query.dtype).repeat(1, 1, repeats, 1)
        output = _weighted_values(grouped, key.transpose(0, 1)[None], value.transpose(0, 1)[None], mask, options, sinks)
        return output.view(heads, tokens, head_dim).transpose(0, 1)

    def _prefill_mask(self, row: PrefillRow, tokens: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """`[1, 1, tokens, context]`: each token sees what is not after it, within the window."""
        mask = self._masks.get((row, window))
        if mask is None:
            device = row.block_table.device
            position = torch.arange(row.length - tokens, row.length, device=device)[:, None]
            context = torch.arange(row.length, device=device)
            seen = context <= position
            if window is not None:
                seen &= context > position - window
            mask = self._masks[row, window] = _additive(seen, dtype)[None, None]
        return mask


def only_decodes(attention: Attention) -> TypeGuard[PagedAttention]:
    """Whether the step is rows of one token for which the kernel is all that is needed, so that programs can have it
    among their operations instead of calling `attend`."""
    if not isinstance(attention, PagedAttention) or attention.decode_kernel is None:
        return False
    plan = attention.plan
    return len(plan.decode) == 1 and not plan.prefill and plan.sources is None


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _whole_prompt(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """A row from its first token on: each sees itself and those before it. All `[tokens, heads, dim]`."""
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output[0].transpose(0, 1)


def _weighted_values(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    options: AttentionOptions,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(scaling · q kᵀ + mask) v, with the class's cap and sinks. All `[rows, heads, tokens, dim]`."""
    if options.softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=options.scaling)
    scaling = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = (query @ keys.transpose(-1, -2)).float() * scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[-2]]
    return weights.to(values.dtype) @ values
