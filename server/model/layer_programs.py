"""Decoder layers of the usual form as programs (`server.model.programs`).

x → h = x + o(attention of norm(x)), h → h + down(f(gate(norm(h))) ⊙ up(norm(h))), with rotated queries and keys, which
may have norms of their own.

A step whose rows all decode is one call for all layers. Any other is two calls a layer, around its attention. What
adapters change at a layer's linear modules are operations among the others, where kernels compute it
(`server.model.delta_kernels`); a layer with other deltas is left to its class.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.model.attention import Attention, AttentionOptions
from server.model.decode_kernel import ATTENTION, layer_fields, page_fields, row_fields
from server.model.delta_kernels import COUNT, DELTA, DeltaKernel, Numbers, delta_call
from server.model.gathered_attention import PagedAttention
from server.model.kv_cache import KVCache
from server.model.program_kernels import (
    ACTIVATIONS,
    ATTEND,
    GATE,
    MOST_TOKENS,
    NORM,
    OPERATION,
    ROTATION,
    SCALE,
    SHIFT,
    UPDATE,
    WRITE,
)
from server.model.programs import Fields, Program, Programs, Records, widths
from server.model.row_deltas import Segment, SitePlan

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")  # of the attention
_KINDS = {"scale": SCALE, "shift": SHIFT, "low_rank": UPDATE}  # of deltas, by the kernel that computes them
_ADDED_TO = ("o_proj", "down_proj")  # what they read is read by nobody else, and what they give is added to the stream


@dataclass(frozen=True)
class LayerForm:
    """What a layer is made of."""

    name: str  # in the model
    products: dict[str, Fields]  # by `PRODUCTS`
    sites: dict[str, str]  # of these, likewise
    scales: dict[str, Tensor]  # of `NORMS`, and of `HEAD_NORMS` where there are any
    epsilons: dict[str, float]
    activation: tuple[str, str]
    layer: int  # for the attention
    options: AttentionOptions
    heads: dict[str, int]  # of q, k, v
    head_dim: int
    rotary_width: int

    @property
    def shape(self) -> tuple[object, ...]:
        """All widths."""
        return (*[widths(self.products[name]) for name in PRODUCTS], *self.heads.values(), self.head_dim)


@dataclass(frozen=True)
class _Step:
    """The program for all steps with the same row deltas."""

    plan: SitePlan
    program: Program
    parts: list[tuple[int, int, int] | None]  # of each layer its first operation, its attention, one past its last
    writes: np.ndarray[Any, Any]  # the operations that write keys and values; the one behind each attends
    tail: int  # the first operation behind the layers
    is_closed: bool  # the plan has nothing else than these operations


@dataclass(frozen=True)
class Tail:
    """What is behind the layers: a norm and the output layer."""

    scale: Tensor  # of the norm
    epsilon: float
    product: Fields


@dataclass
class _Change:
    """Deltas that are applied at one place of a layer: at each level of the stacks kinds and what kernels are told."""

    levels: dict[int, list[tuple[int, tuple[int, ...]]]] = field(default_factory=dict)

    def add(self, level: int, kind: int, call: tuple[int, ...]) -> None:
        self.levels.setdefault(level, []).append((kind, call))


class LayerStack:
    """Layers of a base that are alike in `LayerForm.shape`."""

    def __init__(self, programs: Programs, forms: Sequence[LayerForm], *, is_chain: bool) -> None:
        """`is_chain`: the base passes a layer's output to the next one as it is, and the same angles to all."""
        self.names = [form.name for form in forms]
        self._programs = programs
        self._forms = forms
        self._tail: Tail | None = None
        self._is_chain = is_chain
        self._barrier = programs.barrier
        products = forms[0].products
        width, inner = widths(products["gate_proj"])
        self._numbers = {
            **{name: programs.buffer(name, widths(products[f"{name}_proj"])[1]) for name in "qkv"},
            **{name: programs.buffer(name, width) for name in ("hidden", "normed", "middle")},
            "attended": programs.buffer("attended", widths(products["o_proj"])[0]),
            "gated": programs.buffer("gated", inner),
            "up": programs.buffer("up", inner),
        }
        self._attention = np.zeros(len(forms), ATTENTION)
        for record, form in zip(self._attention, forms, strict=True):
            query, keys, values, attended = (self._heads(name, form) for name in ("q", "k", "v", "attended"))
            for name, number in layer_fields(query, keys, values, attended, form.options, 0).items():
                record[name] = number
        self._chunks = [self._chunks_of(index) for index in range(len(forms))]
        self._cache: Callable[[], KVCache | None] = lambda: None  # a weak reference to the one whose pages records name
        self._kept: object = None  # what else they name
        self._angles: tuple[Tensor, Tensor] | None = None  # of the step under way
        self._plain = self._last = self._compiled({})
        self._result: Tensor | None = None  # of all layers, until the last one has been asked for its own

    def is_whole(self, layers: int) -> bool:
        """Whether these are all of a base's layers, one behind the other."""
        return self._is_chain and len(self._forms) == layers

    def set_tail(self, tail: Tail | None) -> None:
        """What `logits` has behind the layers."""
        self._tail = tail
        self._chunks = [self._chunks_of(index) for index in range(len(self._forms))]
        self._plain = self._last = self._compiled({})

    def step(self, plan: SitePlan) -> _Step:
        """The program for a plan, kept while it is the same."""
        if not plan:
            return self._plain
        if self._last.plan is not plan:
            self._last = self._compiled(plan)
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
        step = self.step(plan)
        part = step.parts[index]
        if part is None:
            return None
        self._begin(step, hidden, cos, sin)
        tokens = hidden.shape[1]
        is_all = index == 0 and self._is_chain and None not in step.parts
        if is_all and isinstance(attention, PagedAttention) and attention.only_decodes:
            self._describe_attention(step, attention, tokens)
            step.program.run(0, step.tail)
            outputs = self._numbers["hidden"][None, :tokens].clone()
            self._result = outputs if len(self._forms) > 1 else None
            return outputs
        self._run_layer(step, part, self._forms[index], attention, tokens)
        return self._numbers["hidden"][None, :tokens].clone()

    def _run_layer(
        self, step: _Step, part: tuple[int, int, int], form: LayerForm, attention: Attention, tokens: int
    ) -> None:
        """One layer around its attention."""
        start, attends, stop = part
        step.program.run(start, attends)
        query, keys, values = (self._heads(name, form)[:tokens] for name in "qkv")
        attended = attention.attend(form.layer, query, keys, values, form.options)
        self._heads("attended", form)[:tokens].copy_(attended)
        step.program.run(attends + 2, stop)

    def logits(self, plan: SitePlan, hidden: Tensor, cos: Tensor, sin: Tensor, attention: PagedAttention) -> Tensor:
        """The logits `[tokens, vocabulary]` of a step whose rows all decode, under a plan that is closed; arguments as
        of `forward`, of a stack that has a tail."""
        assert self._tail is not None, "it has an output layer"
        step = self.step(plan)
        self._begin(step, hidden, cos, sin)
        tokens = hidden.shape[1]
        self._describe_attention(step, attention, tokens)
        logits = torch.empty(tokens, widths(self._tail.product)[1], dtype=torch.float32)
        step.program.records["outputs"][-1] = logits.data_ptr()
        step.program.run()
        return logits

    def _begin(self, step: _Step, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Give a program what the layers are given."""
        tokens, records = hidden.shape[1], step.program.records
        step.program.share(tokens)
        self._numbers["hidden"][:tokens].copy_(hidden[0])
        self._angles = cos, sin = cos.contiguous(), sin.contiguous()
        records["cos"], records["sin"] = cos.data_ptr(), sin.data_ptr()

    def _describe_attention(self, step: _Step, attention: PagedAttention, tokens: int) -> None:
        """Tell the operations that attend what the step's rows are."""
        records = self._attention
        if self._cache() is not attention.cache:
            self._cache = weakref.ref(attention.cache)
            for record, form in zip(records, self._forms, strict=True):
                for name, number in page_fields(attention.cache.layers[form.layer]).items():
                    record[name] = number
        (group,) = attention.plan.decode
        records["num_tokens"] = tokens
        fields, self._kept = row_fields(attention.plan, group, records["kv_heads"])
        for name, numbers in fields.items():
            records[name] = numbers
        units = step.program.records["units"]
        units[step.writes] = records["count"]
        units[step.writes + 1] = records["rows"] * records["shares"]

    def _heads(self, name: str, form: LayerForm) -> Tensor:
        return self._numbers[name].view(MOST_TOKENS, -1, form.head_dim)

    def _compiled(self, plan: SitePlan) -> _Step:
        """The operations of all layers, those of the plan among them."""
        calls: list[tuple[int, ...]] = []
        pieces: list[Records] = []
        parts: list[tuple[int, int, int] | None] = []
        writes: list[int] = []
        at = 0
        for index, form in enumerate(self._forms):
            changes = self._changes(form, plan)
            before, behind = self._pieces(self._chunks[index], {} if changes is None else changes, calls)
            attends = at + sum(map(len, before))
            stop = attends + sum(map(len, behind))
            parts.append(None if changes is None else (at, attends, stop))
            writes.append(attends)
            pieces += before + behind
            at = stop
        pieces += self._tail_pieces()
        # as plain numbers: numpy looks at each field's type again for each piece
        records = np.concatenate([piece.view(np.int64) for piece in pieces]).view(OPERATION)
        deltas = np.array(calls, np.int64).reshape(len(calls), len(DELTA.names or ()))
        changed = np.isin(records["kind"], list(_KINDS.values()))
        records["described"][changed] = deltas.ctypes.data + np.arange(len(calls)) * DELTA.itemsize
        known = {site for form in self._forms for site in form.sites.values()}
        is_closed = None not in parts and plan.keys() <= known
        return _Step(plan, self._programs.program(records, (plan, deltas)), parts, np.array(writes), at, is_closed)

    def _tail_pieces(self) -> list[Records]:
        if self._tail is None:
            return []
        numbers, scale = self._numbers, self._tail.scale
        norm: Fields = {"kind": NORM, "scale": scale, "input_width": len(scale), "epsilon": self._tail.epsilon}
        operations = [
            norm | _between(numbers["hidden"], numbers["normed"]),
            self._tail.product | {"inputs": numbers["normed"]},
        ]
        return [self._programs.describe(operations)]

    def _pieces(
        self, chunks: dict[str, Records], changes: dict[str, _Change], calls: list[tuple[int, ...]]
    ) -> tuple[list[Records], list[Records]]:
        """A layer's operations before its attention, and from it on; what those of deltas are told goes to `calls`, in
        their order."""

        def change(place: str) -> list[Records]:
            return list(self._described(changes[place], calls)) if place in changes else []

        before = [chunks["projections"], *change("projections"), chunks["rotations"]]
        behind = [chunks["attention"], *change("before o_proj"), chunks["o_proj"], *change("o_proj")]
        if "gate" in changes:
            behind += [chunks["gate and up"], *change("gate"), chunks["gate"]]
        else:
            behind.append(chunks["gated"])
        behind += [*change("before down_proj"), chunks["down_proj"], *change("down_proj")]
        return before, behind

    def _described(self, change: _Change, calls: list[tuple[int, ...]]) -> Iterator[Records]:
        """Levels one behind the other, for they change the same numbers; those of one level do not."""
        for _, deltas in sorted(change.levels.items()):
            records = np.zeros(len(deltas), OPERATION)
            records["kind"] = [kind for kind, _ in deltas]
            records["units"] = [call[COUNT] for _, call in deltas]
            records["barrier"][-1] = self._barrier
            calls += [call for _, call in deltas]
            yield records

    def _changes(self, form: LayerForm, plan: SitePlan) -> dict[str, _Change] | None:
        """What a plan changes in a layer, by place; None where some of it is not for these kernels."""
        changes: dict[str, _Change] = {}
        prefix = f"{form.name}."
        linear = set(form.sites.values())
        if any(site.startswith(prefix) and site not in linear for site in plan):
            return None
        for product, site in form.sites.items():
            segments = [(level, each) for level, own in enumerate(plan.get(site, ())) for each in own]
            if not all(_is_operation(product, each) for _, each in segments):
                return None
            if len({each.kind.changes_input for _, each in segments}) > 1:  # outputs change by what inputs were before
                return None
            inputs, outputs = self._passed(product, form)
            for level, (tokens, kind, blocks, _, kernel) in segments:
                assert isinstance(kernel, DeltaKernel), "it is an operation"
                if kind.changes_input:  # from the last level to the first
                    place, order, call = f"before {product}", -level, delta_call(inputs, inputs, tokens, blocks)
                else:
                    place, order, call = _place(product), level, delta_call(inputs, outputs, tokens, blocks)
                if call[COUNT]:
                    changes.setdefault(place, _Change()).add(order, _KINDS[kernel.operation], call)
        return changes

    def _passed(self, product: str, form: LayerForm) -> tuple[Numbers, Numbers]:
        """A product's input and output."""
        reads = {"o_proj": "attended", "down_proj": "gated"}.get(product, "normed")
        gives = {"o_proj": "middle", "down_proj": "hidden", "gate_proj": "gated", "up_proj": "up"}.get(
            product, product[0]
        )
        input_width, output_width = widths(form.products[product])
        return (
            Numbers(self._numbers[reads].data_ptr(), input_width, input_width),
            Numbers(self._numbers[gives].data_ptr(), output_width, output_width),
        )

    def _chunks_of(self, index: int) -> dict[str, Records]:
        """A layer's operations, between which there may be others."""
        form, numbers = self._forms[index], self._numbers
        following = None if self._tail is None else self._tail.product
        if index + 1 < len(self._forms):
            following = self._forms[index + 1].products["q_proj"]
        products = form.products
        q, k, v, o, gate, up, down = (products[name] for name in PRODUCTS)
        gated = self._programs.gated_operation(gate, up, form.activation)
        described: Fields = {"described": self._attention.ctypes.data + index * ATTENTION.itemsize}
        no_wait = {"barrier": 0}
        heads = {name: (form.heads[name], numbers[name]) for name in "qk"}
        norms = [
            _norm(form, name) | {"heads": heads[name[0]][0]} | _between(heads[name[0]][1], heads[name[0]][1])
            for name in HEAD_NORMS
            if name in form.scales
        ]
        turned: Fields = {"kind": ROTATION, "output_width": form.head_dim, "rotary_width": form.rotary_width}
        rotations = [turned | {"heads": count} | _between(each, each) for count, each in heads.values()]
        second_norm = _norm(form, NORMS[1]) | _between(numbers["middle"], numbers["normed"])
        activated: Fields = {
            "kind": GATE,
            "activation": ACTIVATIONS.index(form.activation),
            "output_width": widths(gate)[1],
        }
        chunks: dict[str, list[Fields]] = {
            "projections": [
                _norm(form, NORMS[0]) | _between(numbers["hidden"], numbers["normed"]),
                _leading(q, k) | _between(numbers["normed"], numbers["q"]) | no_wait,
                _leading(k, v) | _between(numbers["normed"], numbers["k"]) | no_wait,
                _leading(v, o) | _between(numbers["normed"], numbers["v"]),
            ],
            "rotations": [*norms, rotations[0] | no_wait, rotations[1]],
            "attention": [{"kind": WRITE, **described}, {"kind": ATTEND, **described}],
            "o_proj": [
                _leading(o, gate) | _between(numbers["attended"], numbers["middle"]) | {"added": numbers["hidden"]}
            ],
            "gated": [second_norm, _leading(gated, down) | _between(numbers["normed"], numbers["gated"])],
            "gate and up": [
                second_norm,
                _leading(gate, up) | _between(numbers["normed"], numbers["gated"]) | no_wait,
                _leading(up, down) | _between(numbers["normed"], numbers["up"]),
            ],
            "gate": [activated | {"outputs": numbers["gated"], "up_outputs": numbers["up"]}],
            "down_proj": [
                _leading(down, following) | _between(numbers["gated"], numbers["hidden"]) | {"added": numbers["middle"]}
            ],
        }
        return {name: self._programs.describe(operations) for name, operations in chunks.items()}


def _norm(form: LayerForm, name: str) -> Fields:
    scale = form.scales[name]
    return {"kind": NORM, "scale": scale, "input_width": len(scale), "epsilon": form.epsilons[name]}


def _between(inputs: Tensor, outputs: Tensor) -> Fields:
    return {"inputs": inputs, "outputs": outputs}


def _leading(product: Fields, following: Fields | None) -> Fields:
    """A product that asks for the next one's weights when it has its own."""
    if following is None:
        return product
    return product | {"next_weight": following["weight"], "next_input_width": following["input_width"]}


def _place(product: str) -> str:
    """Where changes of a product's output are applied."""
    if product in _ADDED_TO:
        return product
    return "gate" if product in ("gate_proj", "up_proj") else "projections"


def _is_operation(product: str, segment: Segment) -> bool:
    """Whether a segment at a product can be one."""
    if not isinstance(segment.kernel, DeltaKernel):
        return False
    if product in _ADDED_TO:  # a scale would be one of the stream, too
        return segment.kind.changes_input or segment.kernel.operation != "scale"
    return not segment.kind.changes_input


Forward = Callable[..., Any]


def either(stack: LayerStack, index: int, own: Forward, plan_of: Callable[[], SitePlan]) -> Forward:
    """A layer's forward: the stack's where it can be used. `plan_of` gives the plan of the step under way."""

    def forward(hidden: Tensor, *others: Any, **named: Any) -> Any:
        if 0 < hidden.shape[1] <= MOST_TOKENS:
            cos, sin = named["position_embeddings"]
            outputs = stack.forward(index, plan_of(), hidden, cos, sin, named["medley_attention"])
            if outputs is not None:
                return outputs
        return own(hidden, *others, **named)

    return forward
