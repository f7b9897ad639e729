"""LLaMA-Adapter on GPT-2: the gated attention to a trained prompt, added to what the attention's sub-block gives out.

PEFT adds it behind the output projection c_proj there, where queries are out of reach. So they are found again from the
residual stream r: with n the sub-block's norm before its weight w and bias b, and k, v the prompt's keys and values by
the layer's own c_attn, the score of a key of head i is

    q · k / √head_dim = n(r) · s + t,    s = w ⊙ W_qᵢᵀ k / √head_dim,    t = (W_qᵢ b + c_qᵢ) · k / √head_dim

with W_q and c_q the queries' part of c_attn. s and t are kept. They would not know of another adapter's change of this
norm or of c_attn, so no stack may have one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.deltas import BaseReader
from server.model import BaseShape, NormForm, RowDelta
from server.model.blocks import Block


@dataclass(frozen=True)
class ResidualAttention(BaseReader):
    """`inputs` are the residual stream before the sub-block's norm, `outputs` what the sub-block adds to it."""

    heads: int
    norm: NormForm

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        """See `DeltaKind`."""
        factors, terms, values = blocks  # [groups, heads · len, hidden], [·, heads · len, 1], [·, len, hidden]: gated
        groups, tokens, _ = inputs.shape
        scores = torch.baddbmm(terms.transpose(1, 2), self.norm.normalized(inputs), factors.transpose(1, 2))
        scores = scores.view(groups, tokens, self.heads, -1).transpose(1, 2)  # [groups, heads, tokens, len]
        weights = scores.softmax(-1, dtype=torch.float32).to(inputs.dtype)
        own = values.view(groups, values.shape[1], self.heads, -1).transpose(1, 2)  # [groups, heads, len, head_dim]
        outputs.add_((weights @ own).transpose(1, 2).reshape(outputs.shape))


def residual_attention(base: BaseShape, block: Block, projection: str, prompt: Tensor, gate: Tensor) -> RowDelta:
    """The delta of an attention's block; `prompt` `[len, hidden]`, `gate` `[1]`; `projection` is the module that makes
    queries, keys and values at once."""
    form = base.sites[block.norm].norm
    assert form is not None, "a block's norm has a form"
    weight, bias = base.weight(projection).double().cpu(), base.bias(projection)
    given = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double().cpu()
    query, key, value = weight.chunk(3)  # [hidden, hidden] each
    query_bias, key_bias, value_bias = given.chunk(3)
    own = prompt.double()
    head_dim = base.layers[0].head_dim
    heads = len(query) // head_dim
    keys = (own @ key.t() + key_bias).view(len(own), heads, head_dim).transpose(0, 1) * head_dim**-0.5
    by_head = query.view(heads, head_dim, -1)
    norm_bias = base.bias(block.norm)
    shift = query_bias if norm_bias is None else query_bias + query @ norm_bias.double().cpu()
    factors = (keys @ by_head).flatten(0, 1) * base.weight(block.norm).double().cpu()
    terms = (keys @ shift.view(heads, head_dim, 1)).flatten(0, 1)  # [heads · len, 1]
    values = gate.double() * (own @ value.t() + value_bias)
    blocks = tuple(part.to(prompt.dtype).contiguous() for part in (factors, terms, values))
    return RowDelta(ResidualAttention((block.norm, projection), heads, form), blocks)
