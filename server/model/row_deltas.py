"""Row deltas: what adapters change at the sites of a step, and how the changes are applied to its tokens.

In a stack of adapters M₀ is the base's module and Mₖ is adapter k's change of Mₖ₋₁ (task first, then user): an
input scale gives Mₖ(x) = Mₖ₋₁(l ⊙ x), everything else adds to or scales the output of Mₖ₋₁(x).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class DeltaKind(ABC):  # noqa: B024 - a kind changes inputs, outputs or both; none is right for all
    """How deltas of one kind change a module, for several groups of tokens at once, each group with its own rows.

    Frozen and equal by value: what is not a tensor (an activation, say) is a field.
    """

    changes_input: bool = False
    looks_up: bool = False  # its first block has a row for each token id; it gets each token's: [groups, tokens, width]

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

    def look_up(self, token_ids: Tensor) -> Tensor:
        """`[tokens, width]`: of a block with a row for each token id, each token's own."""
        return self.pool.index_select(0, self.first + token_ids)


class Segment(NamedTuple):
    """Tokens of a step whose deltas at a site are of one kind: all of one adapter, or each of its own."""

    tokens: slice | Tensor
    kind: DeltaKind
    blocks: tuple[Rows, ...]
    is_each: bool  # each token has its own rows


SitePlan = Mapping[str, Sequence[Sequence[Segment]]]
"""Per site name the levels of the stacks (task, user), each a list of segments that share no token."""


def apply_levels(
    base_forward: Callable[[Tensor], Tensor], inputs: Tensor, levels: Sequence[Sequence[Segment]]
) -> Tensor:
    """Mₙ(inputs): input changes from the last level to the first, the base, output changes back up."""
    seen: list[Tensor] = []  # the input of each level's Mₖ, last level first
    for segments in reversed(levels):
        seen.append(as_rows(inputs))
        inputs = _changed_input(inputs, segments)
    outputs = base_forward(inputs)
    if not outputs.is_contiguous():
        outputs = outputs.contiguous()
    change_outputs(outputs, zip(levels, reversed(seen), strict=True))
    return outputs


def change_outputs(outputs: Tensor, levels: Iterable[tuple[Sequence[Segment], Tensor]]) -> None:
    """Apply each level's segments to `outputs` in place, given the level's inputs as rows."""
    rows = as_rows(outputs)
    for segments, inputs in levels:
        for segment in segments:
            chosen = rows[segment.tokens]
            seen = inputs[segment.tokens]
            blocks = _gathered(segment, seen)
            segment.kind.change_output(_grouped(seen, segment), _grouped(chosen, segment), *blocks)
            if isinstance(segment.tokens, Tensor):  # a copy was changed
                rows[segment.tokens] = chosen


def _gathered(segment: Segment, inputs: Tensor) -> list[Tensor]:
    if not segment.kind.looks_up:
        return [block.gather() for block in segment.blocks]
    table, *blocks = segment.blocks
    return [_grouped(table.look_up(inputs[:, 0]), segment), *(block.gather() for block in blocks)]


def _changed_input(inputs: Tensor, segments: Iterable[Segment]) -> Tensor:
    changing = [segment for segment in segments if segment.kind.changes_input]
    if not changing:
        return inputs
    inputs = inputs.clone(memory_format=torch.contiguous_format)  # the base's other modules read the original too
    rows = as_rows(inputs)
    for segment in changing:
        chosen = rows[segment.tokens]
        segment.kind.change_input(_grouped(chosen, segment), *[block.gather() for block in segment.blocks])
        if isinstance(segment.tokens, Tensor):
            rows[segment.tokens] = chosen
    return inputs


def as_rows(values: Tensor) -> Tensor:
    """`[tokens, width]`; for a norm of each head `[tokens, heads, width]`."""
    return values.flatten(0, 1) if values.dim() == 4 else values.reshape(-1, values.shape[-1])


def _grouped(tokens: Tensor, segment: Segment) -> Tensor:
    """`[tokens, (heads,) width]` as `[groups, tokens of a group, width]`: heads are like tokens of the group."""
    return tokens.view(len(tokens), -1, tokens.shape[-1]) if segment.is_each else tokens.flatten(0, -2)[None]
