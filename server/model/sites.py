"""Sites: the modules of the base at which adapters act, each wrapped once at load.

A site's module keeps its weights, its class and its place in the model; only its `forward` is led through
the site, which applies the step's row deltas around it. Without deltas the base's own forward runs.

In a stack of adapters M₀ is the base's module and Mₖ is adapter k's change of Mₖ₋₁ (task first, then user): an
input scale gives Mₖ(x) = Mₖ₋₁(l ⊙ x), everything else adds to or scales the output of Mₖ₋₁(x).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model import products


class DeltaKind(ABC):  # noqa: B024 - a kind changes inputs, outputs or both; none is right for all
    """How deltas of one kind change a module, for several groups of tokens at once, each group with its own rows.

    Frozen and equal by value: what is not a tensor (an activation, say) is a field.
    """

    changes_input: bool = False

    def change_input(self, inputs: Tensor, *blocks: Tensor) -> None:  # noqa: B027 - most change outputs only
        """Change `inputs` `[groups, tokens, in]`, a copy that is this site's own; `blocks` `[groups, rows, width]`."""

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:  # noqa: B027 - see above
        """Change `outputs` `[groups, tokens, out]` in place, given Mₖ's `inputs` `[groups, tokens, in]`."""


@dataclass(frozen=True, eq=False)
class RowDelta:
    """One adapter's change of one module."""

    kind: DeltaKind
    blocks: tuple[Tensor, ...]  # each [rows, width], as its kind says


@dataclass(frozen=True, eq=False)
class Rows:
    """One block of the deltas of a group: rows out of a pool."""

    pool: Tensor  # [all rows, width]
    first: int | Tensor  # the block's first row: one adapter's, or each token's [tokens]
    count: int

    def gather(self) -> Tensor:
        """`[groups, rows, width]`: one group with one adapter's rows, or a group for each token."""
        if isinstance(self.first, int):
            return self.pool[self.first : self.first + self.count][None]
        index = self.first[:, None] + torch.arange(self.count, device=self.first.device)
        return self.pool.index_select(0, index.flatten()).view(len(index), self.count, -1)


class Segment(NamedTuple):
    """Tokens of a step whose deltas at a site are of one kind: all of one adapter, or each of its own."""

    tokens: slice | Tensor
    kind: DeltaKind
    blocks: tuple[Rows, ...]
    is_each: bool  # each token has its own rows


SitePlan = Mapping[str, Sequence[Sequence[Segment]]]
"""Per site name the levels of the stacks (task, user), each a list of segments that share no token."""


@dataclass(frozen=True)
class SiteShape:
    """A site's widths, and whether it is the output head, whose rows are the positions that need logits."""

    inputs: int
    outputs: int
    is_head: bool


class Sites:
    """All sites of one model, by their module's name in it."""

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        """Wrap every linear module (`nn.Linear`, or `Conv1D` with its transposed weight), its weight packed where that
        is possible."""
        self.shapes: dict[str, SiteShape] = {}
        self._plan: SitePlan = {}
        self._packed: set[nn.Module] = set()
        for name, module in model.named_modules():
            shape = _linear_shape(module)
            if shape is None:
                continue
            self.shapes[name] = SiteShape(*shape, is_head=module is head)
            forward = module.forward
            if products.can_pack(module):
                forward = products.pack(module)
                self._packed.add(module)
            module.forward = self._wrap(name, forward)

    def is_packed(self, module: object) -> bool:
        """Whether it is a site's module with a packed weight."""
        return module in self._packed

    def touches(self, names: Iterable[str]) -> bool:
        """Whether the step under way has deltas at one of these sites."""
        return not self._plan.keys().isdisjoint(names)

    def _wrap(self, name: str, base_forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            levels = self._plan.get(name)
            return _apply(base_forward, inputs, levels) if levels else base_forward(inputs)

        return forward

    @contextmanager
    def applying(self, plan: SitePlan) -> Iterator[None]:
        """Run the base with these deltas inside the block."""
        self._plan = plan
        try:
            yield
        finally:
            self._plan = {}


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return None


def _apply(base_forward: Callable[[Tensor], Tensor], inputs: Tensor, levels: Sequence[Sequence[Segment]]) -> Tensor:
    """Mₙ(inputs): input changes from the last level to the first, the base, output changes back up."""
    seen: list[Tensor] = []  # the input of each level's Mₖ, last level first
    for segments in reversed(levels):
        seen.append(inputs.reshape(-1, inputs.shape[-1]))
        inputs = _changed_input(inputs, segments)
    outputs = base_forward(inputs)
    rows = outputs.view(-1, outputs.shape[-1])
    for segments, level_inputs in zip(levels, reversed(seen), strict=True):
        for segment in segments:
            chosen = rows[segment.tokens]
            blocks = [block.gather() for block in segment.blocks]
            given = level_inputs[segment.tokens]
            segment.kind.change_output(_grouped(given, segment), _grouped(chosen, segment), *blocks)
            if isinstance(segment.tokens, Tensor):  # a copy was changed
                rows[segment.tokens] = chosen
    return outputs


def _changed_input(inputs: Tensor, segments: Iterable[Segment]) -> Tensor:
    changing = [segment for segment in segments if segment.kind.changes_input]
    if not changing:
        return inputs
    inputs = inputs.clone()  # the base's other modules read the original too
    rows = inputs.view(-1, inputs.shape[-1])
    for segment in changing:
        chosen = rows[segment.tokens]
        segment.kind.change_input(_grouped(chosen, segment), *[block.gather() for block in segment.blocks])
        if isinstance(segment.tokens, Tensor):
            rows[segment.tokens] = chosen
    return inputs


def _grouped(tokens: Tensor, segment: Segment) -> Tensor:
    """`[tokens, width]` as `[groups, tokens of a group, width]`."""
    return tokens[:, None] if segment.is_each else tokens[None]
