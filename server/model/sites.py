"""Sites: the modules of the base at which adapters act, each wrapped once at load.

A site's module keeps its weights, its class and its place in the model; only its `forward` is led through
the site, which applies the step's row deltas around it. Without deltas the base's own forward runs.

In a stack of adapters M₀ is the base's module and Mₖ is adapter k's change of Mₖ₋₁ (task first, then user): an
input scale gives Mₖ(x) = Mₖ₋₁(l ⊙ x), everything else adds to or scales the output of Mₖ₋₁(x).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model import products


class RowDelta(ABC):
    """One adapter's change of one module, applied to the rows of that adapter, in place."""

    changes_input: bool = False

    def change_input(self, inputs: Tensor) -> None:  # noqa: B027 - most change outputs only
        """Change `[tokens, in]`, a copy that is this site's own."""

    def change_output(self, inputs: Tensor, outputs: Tensor) -> None:  # noqa: B027 - some change inputs only
        """Change `outputs` `[tokens, out]`, given Mₖ's `inputs` `[tokens, in]`."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What it keeps resident."""

    @abstractmethod
    def to(self, device: torch.device) -> RowDelta:
        """The same delta with its tensors on `device`."""


class Segment(NamedTuple):
    """Neighbouring tokens of a step that share a delta."""

    start: int
    stop: int
    delta: RowDelta


SitePlan = Mapping[str, Sequence[Sequence[Segment]]]
"""Per site name the levels of the stacks (task, user), each a list of disjoint segments."""


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
        for start, stop, delta in segments:
            delta.change_output(level_inputs[start:stop], rows[start:stop])
    return outputs


def _changed_input(inputs: Tensor, segments: Iterable[Segment]) -> Tensor:
    changing = [segment for segment in segments if segment.delta.changes_input]
    if not changing:
        return inputs
    inputs = inputs.clone()  # the base's other modules read the original too
    rows = inputs.view(-1, inputs.shape[-1])
    for start, stop, delta in changing:
        delta.change_input(rows[start:stop])
    return inputs
