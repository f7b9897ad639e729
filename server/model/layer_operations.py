"""The operations of decoder layers of the usual form, and of row deltas among them.

x → h = x + o(attention of norm(x)), h → h + down(f(gate(norm(h))) ⊙ up(norm(h))), with rotated queries and keys, which
may have norms of their own.

What adapters change at a layer's linear modules are operations between the layer's own, where kernels compute it
(`server.model.delta_kernels`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from server.model.activations import Activation
from server.model.attention import AttentionOptions
from server.model.decode_kernel import ATTENTION, layer_fields
from server.model.delta_kernels import COUNT, DELTA, DeltaKernel, Numbers, delta_call
from server.model.program_kernels import MOST_TOKENS, OPERATION, Kind
from server.model.programs import Fields, Program, Programs, Records, widths
from server.model.row_deltas import Segment, SitePlan

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")  # of the attention
_DELTA_KINDS = {"scale": Kind.SCALE, "shift": Kind.SHIFT, "low_rank": Kind.UPDATE}  # by a kind's `compiled`
_ADDED_TO = ("o_proj", "down_proj")  # what they read is read by nobody else, and what they give is added to the stream


@dataclass(frozen=True)
class LayerForm:
    """What a layer is made of."""

    name: str  # in the model
    products: dict[str, Fields]  # by `PRODUCTS`
    sites: dict[str, str]  # of these, likewise
    scales: dict[str, Tensor]  # of `NORMS`, and of `HEAD_NORMS` where there are any
    epsilons: dict[str, float]
    activation: Activation
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
class Tail:
    """What is behind the layers: a norm and the output layer."""

    scale: Tensor  # of the norm
    epsilon: float
    product: Fields


@dataclass(frozen=True)
class StackProgram:
    """What a stack of layers runs in all steps with the same row deltas."""

    plan: SitePlan
    program: Program
    parts: list[tuple[int, int, int] | None]  # of each layer its first operation, its attention, one past its last
    writes: np.ndarray[Any, Any]  # the operations that write keys and values; the one behind each attends
    tail: int  # the first operation behind the layers
    is_closed: bool  # the plan has nothing else than these operations


@dataclass
class _Change:
    """Deltas that are applied at one place of a layer: at each level of the stacks kinds and kernels' arguments."""

    levels: dict[int, list[tuple[Kind, tuple[int, ...]]]] = field(default_factory=dict)

    def add(self, level: int, kind: Kind, call: tuple[int, ...]) -> None:
        self.levels.setdefault(level, []).append((kind, call))


class StackOperations:
    """Compiles row deltas and the operations of layers that are alike in `LayerForm.shape` into programs."""

    def __init__(self, programs: Programs, forms: Sequence[LayerForm]) -> None:
        """All programs share these buffers, and so do stacks of the same widths."""
        self.forms = forms
        self._programs = programs
        products = forms[0].products
        width, inner = widths(products["gate_proj"])
        self.buffers = {
            **{name: programs.buffer(name, widths(products[f"{name}_proj"])[1]) for name in "qkv"},
            **{name: programs.buffer(name, width) for name in ("hidden", "normed", "middle")},
            "attended": programs.buffer("attended", widths(products["o_proj"])[0]),
            "gated": programs.buffer("gated", inner),
            "up": programs.buffer("up", inner),
        }
        self.attention = np.zeros(len(forms), ATTENTION)
        """What the operations that attend are told, layer by layer; of a step's rows the stack tells them."""
        for record, form in zip(self.attention, forms, strict=True):
            query, keys, values, attended = (self.heads(name, form) for name in ("q", "k", "v", "attended"))
            for name, number in layer_fields(query, keys, values, attended, form.options).items():
                record[name] = number
        self.set_tail(None)

    def set_tail(self, tail: Tail | None) -> None:
        """What programs have behind the layers."""
        self.tail = tail
        self._chunks = [self._layer_chunks(index) for index in range(len(self.forms))]

    def heads(self, name: str, form: LayerForm) -> Tensor:
        """A buffer as `[MOST_TOKENS, heads, head_dim]`."""
        return self.buffers[name].view(MOST_TOKENS, -1, form.head_dim)

    def compiled(self, plan: SitePlan) -> StackProgram:
        """The operations of all layers, those of the plan among them."""
        calls: list[tuple[int, ...]] = []
        pieces: list[Records] = []
        parts: list[tuple[int, int, int] | None] = []
        writes: list[int] = []
        at = 0
        for index, form in enumerate(self.forms):
            changes = self._changes(form, plan)
            before, behind = self._pieces(self._chunks[index], {} if changes is None else changes, calls)
            attends = at + sum(map(len, before))
            stop = attends + sum(map(len, behind))
            parts.append(None if changes is None else (at, attends, stop))
            writes.append(attends)
            pieces += before + behind
            at = stop
        pieces += self._tail_records()
        # as plain numbers: numpy looks at each field's type again for each piece
        records = np.concatenate([piece.view(np.int64) for piece in pieces]).view(OPERATION)
        deltas = np.array(calls, np.int64).reshape(len(calls), len(DELTA.names or ()))
        changed = np.isin(records["kind"], list(_DELTA_KINDS.values()))
        records["descriptor"][changed] = deltas.ctypes.data + np.arange(len(calls)) * DELTA.itemsize
        known = {site for form in self.forms for site in form.sites.values()}
        is_closed = None not in parts and plan.keys() <= known
        program = self._programs.program(records, (plan, deltas))
        return StackProgram(plan, program, parts, np.array(writes), at, is_closed)

    def _tail_records(self) -> list[Records]:
        if self.tail is None:
            return []
        buffers, scale = self.buffers, self.tail.scale
        norm: Fields = {"kind": Kind.NORM, "scale": scale, "input_width": len(scale), "epsilon": self.tail.epsilon}
        operations = [
            norm | _between(buffers["hidden"], buffers["normed"]),
            self.tail.product | {"inputs": buffers["normed"]},
        ]
        return [self._programs.describe(operations)]

    def _pieces(
        self, chunks: dict[str, Records], changes: dict[str, _Change], calls: list[tuple[int, ...]]
    ) -> tuple[list[Records], list[Records]]:
        """A layer's operations before its attention, and from it on; the arguments of those of deltas go to `calls`, in
        their order."""

        def change(place: str) -> list[Records]:
            return list(self._delta_records(changes[place], calls)) if place in changes else []

        before = [chunks["projections"], *change("projections"), chunks["rotations"]]
        behind = [chunks["attention"], *change("before o_proj"), chunks["o_proj"], *change("o_proj")]
        if "gate" in changes:
            behind += [chunks["gate and up"], *change("gate"), chunks["gate"]]
        else:
            behind.append(chunks["gated"])
        behind += [*change("before down_proj"), chunks["down_proj"], *change("down_proj")]
        return before, behind

    def _delta_records(self, change: _Change, calls: list[tuple[int, ...]]) -> Iterator[Records]:
        """Levels one behind the other, for they change the same numbers; those of one level do not."""
        for _, deltas in sorted(change.levels.items()):
            records = np.zeros(len(deltas), OPERATION)
            records["kind"] = [kind for kind, _ in deltas]
            records["units"] = [call[COUNT] for _, call in deltas]
            records["barrier"][-1] = self._programs.barrier
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
            inputs, outputs = self._input_and_output(product, form)
            for level, (tokens, kind, blocks, _, kernel) in segments:
                assert isinstance(kernel, DeltaKernel), "it is an operation"
                if kind.changes_input:  # from the last level to the first
                    place, order, call = f"before {product}", -level, delta_call(inputs, inputs, tokens, blocks)
                else:
                    place, order, call = _place(product), level, delta_call(inputs, outputs, tokens, blocks)
                if call[COUNT]:
                    changes.setdefault(place, _Change()).add(order, _DELTA_KINDS[kernel.operation], call)
        return changes

    def _input_and_output(self, product: str, form: LayerForm) -> tuple[Numbers, Numbers]:
        """A product's input and output."""
        reads = {"o_proj": "attended", "down_proj": "gated"}.get(product, "normed")
        gives = {"o_proj": "middle", "down_proj": "hidden", "gate_proj": "gated", "up_proj": "up"}.get(
            product, product[0]
        )
        input_width, output_width = widths(form.products[product])
        return (
            Numbers(self.buffers[reads].data_ptr(), input_width, input_width),
            Numbers(self.buffers[gives].data_ptr(), output_width, output_width),
        )

    def _layer_chunks(self, index: int) -> dict[str, Records]:
        """A layer's operations, between which there may be others."""
        form, buffers = self.forms[index], self.buffers
        following = None if self.tail is None else self.tail.product
        if index + 1 < len(self.forms):
            following = self.forms[index + 1].products["q_proj"]
        products = form.products
        q, k, v, o, gate, up, down = (products[name] for name in PRODUCTS)
        gated = self._programs.gated_operation(gate, up, form.activation)
        descriptor: Fields = {"descriptor": self.attention.ctypes.data + index * ATTENTION.itemsize}
        no_wait = {"barrier": 0}
        heads = {name: (form.heads[name], buffers[name]) for name in "qk"}
        norms = [
            _norm(form, name) | {"heads": heads[name[0]][0]} | _between(heads[name[0]][1], heads[name[0]][1])
            for name in HEAD_NORMS
            if name in form.scales
        ]
        if len(norms) == len(HEAD_NORMS):
            norms[0] |= no_wait
        rotated: Fields = {"kind": Kind.ROTATION, "output_width": form.head_dim, "rotary_width": form.rotary_width}
        rotations = [rotated | {"heads": count} | _between(each, each) for count, each in heads.values()]
        second_norm = _norm(form, NORMS[1]) | _between(buffers["middle"], buffers["normed"])
        activated: Fields = {
            "kind": Kind.GATE,
            "activation": form.activation,
            "output_width": widths(gate)[1],
        }
        chunks: dict[str, list[Fields]] = {
            "projections": [
                _norm(form, NORMS[0]) | _between(buffers["hidden"], buffers["normed"]),
                _leading(q, k) | _between(buffers["normed"], buffers["q"]) | no_wait,
                _leading(k, v) | _between(buffers["normed"], buffers["k"]) | no_wait,
                _leading(v, o) | _between(buffers["normed"], buffers["v"]),
            ],
            "rotations": [*norms, rotations[0] | no_wait, rotations[1]],
            "attention": [{"kind": Kind.WRITE, **descriptor}, {"kind": Kind.ATTEND, **descriptor}],
            "o_proj": [
                _leading(o, gate) | _between(buffers["attended"], buffers["middle"]) | {"added": buffers["hidden"]}
            ],
            "gated": [second_norm, _leading(gated, down) | _between(buffers["normed"], buffers["gated"])],
            "gate and up": [
                second_norm,
                _leading(gate, up) | _between(buffers["normed"], buffers["gated"]) | no_wait,
                _leading(up, down) | _between(buffers["normed"], buffers["up"]),
            ],
            "gate": [activated | {"outputs": buffers["gated"], "up_outputs": buffers["up"]}],
            "down_proj": [
                _leading(down, following) | _between(buffers["gated"], buffers["hidden"]) | {"added": buffers["middle"]}
            ],
        }
        return {name: self._programs.describe(operations) for name, operations in chunks.items()}


def _norm(form: LayerForm, name: str) -> Fields:
    scale = form.scales[name]
    return {"kind": Kind.NORM, "scale": scale, "input_width": len(scale), "epsilon": form.epsilons[name]}


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
