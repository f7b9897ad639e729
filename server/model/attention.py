"""Attention of a packed step over KV pages, behind `transformers`' attention interface.

All rows of a step lie one behind the other in one sequence `[1, num_tokens]`. In each layer the step's keys
and values are written into the pages first; then every row attends to its own pages. So a row may also read
what another row of the same step has just written: that is how requests share a prefix in the step that
computes it.

An `Attention` does both for one step. There are two: `server.model.paged_attention` works everywhere;
`server.model.varlen_attention` has a CUDA kernel read the pages of all rows where they are.

The registered function looks for an `Attention` in the keyword arguments that the model passes through; the
model's own module, unmodified, calls it. What a model passes that is not honoured here is found by the probe
(`server.model.probe`) and refuses the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

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


@dataclass(frozen=True, eq=False)
class DecodeGroup:
    """Rows of one token each, of like context length, that attend in one call."""

    start: int  # its rows among the step's decode rows
    stop: int
    block_tables: Tensor  # [rows, pages], padded with the null page
    lengths: Tensor  # [rows], context length, the token itself included


@dataclass(frozen=True, eq=False)
class PrefillRow:
    """A row of several tokens, at the end of its context."""

    start: int  # its tokens in the packed step
    stop: int
    block_table: Tensor  # [pages]
    length: int  # context length, the row's tokens included


@dataclass(frozen=True, eq=False)
class VarlenRows:
    """All rows of a step, whatever their number of tokens, for one call of a kernel that reads pages itself."""

    starts: Tensor  # [rows + 1], int32: row i has the tokens starts[i] … starts[i + 1] - 1
    lengths: Tensor  # [rows], int32, context length, the row's tokens included
    block_tables: Tensor  # [rows, pages], int32, padded with the null page
    most_tokens: int  # of a row, at most
    longest: int  # context, at most


@dataclass(frozen=True)
class AttentionPlan:
    """Where a step's keys and values go, and what each row sees. Built once per step, read by every layer."""

    slots: Tensor  # [writes], cache slots
    sources: Tensor | None  # [writes], token of each slot; None: token i to slots[i]
    decode_tokens: Tensor  # [decode rows], their index in the packed step
    decode: list[DecodeGroup]  # together all decode rows, in the order of `decode_tokens`
    prefill: list[PrefillRow]
    varlen: VarlenRows | None = None  # all rows, for a kernel that reads pages itself; then the three above are empty

    def written(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of the step's keys and values `[num_tokens, kv_heads, head_dim]` those that go to `slots`."""
        return (key, value) if self.sources is None else (key[self.sources], value[self.sources])
