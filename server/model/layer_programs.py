"""Runs decoder layers as programs of their operations (`server.model.layer_operations`).

A step whose rows all decode is one call for all layers. Any other is two calls a layer, around its attention. A layer
with deltas that are no operations is left to its class.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from server.model.attention import Attention
from server.model.decode_kernel import page_fields, row_fields
from server.model.kv_cache import KVCache
from server.model.layer_operations import LayerForm, StackOperations, StackProgram, Tail
from server.model.paged_attention import PagedAttention, only_decodes
from server.model.program_kernels import MOST_TOKENS
from server.model.programs import Programs, widths
from server.model.row_deltas import SitePlan

Forward = Callable[..., Any]


class LayerStack:
    """Layers of a base that are alike in `LayerForm.shape`.

    `forward` stands for each layer's own. Where the first layer's can run them all, it does; what it returns passes
    unchanged through the `forward` of the others, which know it by its identity.
    """

    def __init__(self, programs: Programs, forms: Sequence[LayerForm], *, is_chain: bool) -> None:
        """`is_chain`: the base passes a layer's output to the next one as it is, and the same angles to all."""
        self.names = [form.name for form in forms]
        self._forms = forms
        self._is_chain = is_chain
        self._operations = StackOperations(programs, forms)
        self._hidden = self._operations.buffers["hidden"]
        self._cache: Callable[[], KVCache | None] = lambda: None  # a weak reference to the one whose pages records name
        self._kept: object = None  # what else they name
        self._angles: tuple[Tensor, Tensor] | None = None  # of the step under way
        self._plain = self._last = self._operations.compiled({})
        self._result: Tensor | None = None  # of all layers, until the last one has been asked for its own

    def is_whole(self, layers: int) -> bool:
        """Whether these are all of a base's layers, one behind the other."""
        return self._is_chain and len(self._forms) == layers

    def set_tail(self, tail: Tail | None) -> None:
        """What `logits` has behind the layers."""
        self._operations.set_tail(tail)
        self._plain = self._last = self._operations.compiled({})

    def program(self, plan: SitePlan) -> StackProgram:
        """That of a plan, kept while it is the same."""
        if not plan:
            return self._plain
        if self._last.plan is not plan:
            self._last = self._operations.compiled(plan)
        return self._last

    def forward(
        self, index: int, plan: SitePlan, hidden: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor | None:
        """A layer's output for `hidden` `[1, tokens, width]`; `cos` and `sin` are `[1, tokens, rotary width]`.

        None where the layer has deltas that are no operations.
        """
        if hidden is self._result:  # all layers have run
            if index == len(self._forms) - 1:
                self._result = None
            return hidden
        stack = self.program(plan)
        part = stack.parts[index]
        if part is None:
            return None
        self._begin(stack, hidden, cos, sin)
        tokens = hidden.shape[1]
        if index == 0 and self._is_chain and None not in stack.parts and only_decodes(attention):
            self._set_rows(stack, attention)
            stack.program.run(0, stack.tail)
            outputs = self._hidden[None, :tokens].clone()
            self._result = outputs if len(self._forms) > 1 else None
            return outputs
        self._run_layer(stack, part, self._forms[index], attention, tokens)
        return self._hidden[None, :tokens].clone()

    def _run_layer(
        self, stack: StackProgram, part: tuple[int, int, int], form: LayerForm, attention: Attention, tokens: int
    ) -> None:
        """One layer around its attention."""
        start, attends, stop = part
        stack.program.run(start, attends)
        query, keys, values = (self._operations.heads(name, form)[:tokens] for name in "qkv")
        attended = attention.attend(form.layer, query, keys, values, form.options)
        self._operations.heads("attended", form)[:tokens].copy_(attended)
        stack.program.run(attends + 2, stop)

    def logits(self, plan: SitePlan, hidden: Tensor, cos: Tensor, sin: Tensor, attention: PagedAttention) -> Tensor:
        """The logits `[tokens, vocabulary]` of a step whose rows all decode, under a plan that is closed; arguments as
        of `forward`, of a stack that has a tail."""
        tail = self._operations.tail
        assert tail is not None, "it has an output layer"
        stack = self.program(plan)
        self._begin(stack, hidden, cos, sin)
        tokens = hidden.shape[1]
        self._set_rows(stack, attention)
        logits = torch.empty(tokens, widths(tail.product)[1], dtype=torch.float32)
        stack.program.set_outputs(-1, logits)
        stack.program.run()
        return logits

    def _begin(self, stack: StackProgram, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Give a program what the layers are given."""
        tokens, records = hidden.shape[1], stack.program.records
        stack.program.share(tokens)
        self._hidden[:tokens].copy_(hidden[0])
        self._angles = cos, sin = cos.contiguous(), sin.contiguous()
        records["cos"], records["sin"] = cos.data_ptr(), sin.data_ptr()

    def _set_rows(self, stack: StackProgram, attention: PagedAttention) -> None:
        """Tell the operations that attend what the step's rows are."""
        records = self._operations.attention
        if self._cache() is not attention.cache:
            self._cache = weakref.ref(attention.cache)
            for record, form in zip(records, self._forms, strict=True):
                for name, number in page_fields(attention.cache.layers[form.layer]).items():
                    record[name] = number
        (group,) = attention.plan.decode
        fields, self._kept = row_fields(attention.plan, group, records["kv_heads"])
        for name, numbers in fields.items():
            records[name] = numbers
        units = stack.program.records["units"]
        units[stack.writes] = records["count"]
        units[stack.writes + 1] = records["rows"] * records["shares"]


def stack_or_own(stack: LayerStack, index: int, own: Forward, plan_of: Callable[[], SitePlan]) -> Forward:
    """A layer's forward: the stack's where it can be used. `plan_of` gives the plan of the step under way."""

    def forward(hidden: Tensor, *others: Any, **named: Any) -> Any:
        if 0 < hidden.shape[1] <= MOST_TOKENS:
            cos, sin = named["position_embeddings"]
            outputs = stack.forward(index, plan_of(), hidden, cos, sin, named["medley_attention"])
            if outputs is not None:
                return outputs
        return own(hidden, *others, **named)

    return forward
