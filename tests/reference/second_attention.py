"""LLaMA-Adapter on plain `transformers` modules: a second attention.

Its queries are those that the layer computes, whatever other adapters have made of its projections; its keys and values
are the trained prompt's by the base's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def attend_too(attention: Any, own: Any, prompt: Tensor, gate: Tensor) -> None:
    """Let a layer's `attention` do so; `own` is the base's, `prompt` `[1, len, hidden]`, `gate` `[1]`."""
    (_attend_behind if hasattr(attention, "c_attn") else _attend_before)(attention, own, prompt, gate)


def _attend_before(attention: Any, own: Any, prompt: Tensor, gate: Tensor) -> None:
    """On Llama: the result is added to what enters the output projection."""
    seen: dict[str, Any] = {}
    keys, values = own.k_proj(prompt), own.v_proj(prompt)

    def note_rotation(_module: nn.Module, arguments: Any, given: dict[str, Any]) -> None:
        seen["rotation"] = given["position_embeddings"]

    def note_queries(_module: nn.Module, arguments: Any, output: Tensor) -> None:
        seen["queries"] = output

    def add(_module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        queries = _by_head(seen["queries"], own.head_dim)
        queries, _ = apply_rotary_pos_emb(queries, queries, *seen["rotation"])
        return (arguments[0] + gate * _attended(queries, keys, values),)

    attention.register_forward_pre_hook(note_rotation, with_kwargs=True)
    attention.q_proj.register_forward_hook(note_queries)
    attention.o_proj.register_forward_pre_hook(add)


def _attend_behind(attention: Any, own: Any, prompt: Tensor, gate: Tensor) -> None:
    """On GPT-2: the result is added to what leaves the output projection."""
    seen: dict[str, Tensor] = {}
    _, keys, values = own.c_attn(prompt).chunk(3, dim=-1)

    def note_queries(_module: nn.Module, arguments: Any, output: Tensor) -> None:
        seen["queries"] = output.chunk(3, dim=-1)[0]

    def add(_module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output + gate * _attended(_by_head(seen["queries"], own.head_dim), keys, values)

    attention.c_attn.register_forward_hook(note_queries)
    attention.c_proj.register_forward_hook(add)


def _by_head(values: Tensor, head_dim: int) -> Tensor:
    """`[1, n, heads · head_dim]` as `[1, heads, n, head_dim]`."""
    return values.view(1, values.shape[1], -1, head_dim).transpose(1, 2)


def _attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of queries `[1, heads, n, head_dim]` to keys and values `[1, len, kv_heads · head_dim]`, as
    `[1, n, heads · head_dim]`."""
    head_dim = queries.shape[-1]
    repeats = queries.shape[1] * head_dim // keys.shape[-1]
    keys, values = (_by_head(part, head_dim).repeat_interleave(repeats, 1) for part in (keys, values))
    weights = torch.softmax(queries @ keys.transpose(2, 3) / head_dim**0.5, -1)
    return (weights @ values).transpose(1, 2).flatten(2)
