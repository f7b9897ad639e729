"""Row deltas: what adapters change at the sites of a step, and how the changes are applied to its tokens.

In a stack of adapters M₀ is the base's module and Mₖ is adapter k's change of Mₖ₋₁ (task first, then user): an
input scale gives Mₖ(x) = Mₖ₋₁(l ⊙ x), everything else adds to or scales the output of Mₖ₋₁(x). What is relative to the
base (D, say: another module in its place) contributes its difference: Mₖ(x) = Mₖ₋₁(x) + D(x) - M₀(x).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class DeltaKind(ABC):  # noqa: B024 - a kind changes inputs or outputs; neither is right for all
    """How deltas of one kind change a module, for several groups of tokens at once, each group with its own rows.

    Frozen and equal by value: what is not a tensor (an activation, say) is a field. Rows of zeros change nothing: a
    step is filled up with tokens whose rows are zero.
    """

    changes_input: bool = False  # and then no output
    looks_up: bool = False  # its first block has a row for each token id; it gets each token's: [groups, tokens, width]
    is_relative: bool = False  # its change is meant for the base's own output
    is_elementwise: bool = False  # so cheap that many tokens of one adapter may each have a copy of its rows
    compiled: str | None = None  # the kernel that computes the same, of a `DeltaBackend`
    by_adapter: bool = False  # its blocks are too large for a copy per token: each adapter is applied by itself

    def change_input(self, inputs: Tensor, *blocks: Tensor) -> None:  # noqa: B027 - most change outputs
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
    """One block of one adapter's delta: rows of a pool."""

    pool: Tensor  # [all rows, width]
    first: int  # the block's first row
    count: int

    def gather(self) -> Tensor:
        """`[1, rows, width]`, as they lie in the pool."""
        return self.pool.narrow(0, self.first, self.count)[None]

    def look_up(self, token_ids: Tensor) -> Tensor:
        """`[tokens, width]`: of a block with a row for each token id, each token's own."""
        return self.pool.index_select(0, token_ids + self.first)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """One block of the deltas of several tokens, each with rows of its own: rows of a pool."""

    pool: Tensor  # [all rows, width]
    index: Tensor  # [tokens, rows], any strides; of a block with a row for each token id the first one, [tokens, 1]

    @property
    def count(self) -> int:
        """Rows of a token."""
        return self.index.shape[1]

    def gather(self) -> Tensor:
        """`[tokens, rows, width]`, a copy."""
        return self.pool.index_select(0, self.index.reshape(-1)).view(*self.index.shape, -1)

    def look_up(self, token_ids: Tensor) -> Tensor:
        """See `Rows`."""
        return self.pool.index_select(0, token_ids + self.index[:, 0])


@dataclass(frozen=True, eq=False)
class RunRows(TokenRows):
    """The same of several runs of neighbouring tokens: `index` is `[runs, rows]`, and so is what is gathered."""

    ends: Tensor  # [runs], int32: one past each run's last token, counted among the segment's


Blocks = tuple[Rows, ...] | tuple[TokenRows, ...]

Kernel = Callable[[Tensor, Tensor, slice | Tensor, Blocks], None]
"""Changes those rows of the second tensor that the third names in place, given the same of the first; both
`[all, width]`."""


class DeltaBackend(Protocol):
    """What computes kinds at linear modules in their place; each sort of device has its own. Rows of zeros change
    nothing."""

    run_work: int
    """Tokens of one adapter × rows of a block up to which what goes token by token is as fast as matrix products."""

    def of(self, kind: DeltaKind) -> Kernel | None:
        """The kernel that computes the same as `kind`; None where there is none."""

    def of_runs(self, kind: DeltaKind) -> Kernel | None:
        """The same for runs of many tokens, whose blocks are `RunRows`; None: each run is left to the kind itself."""


class Segment(NamedTuple):
    """Tokens of a step whose deltas at a site are of one kind: all of one adapter, or each of its own."""

    tokens: slice | Tensor
    kind: DeltaKind
    blocks: Blocks
    is_each: bool  # each token has its own rows
    kernel: Kernel | None = None  # in place of the kind


SitePlan = Mapping[str, Sequence[Sequence[Segment]]]
"""Per site name the levels of the stacks (task, user), each a list of segments that share no token."""


def apply_levels(
    base_forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    levels: Sequence[Sequence[Segment]],
    *,
    owns_inputs: bool = False,
) -> Tensor:
    """Mₙ(inputs): input changes from the last level to the first, the base, output changes back up.

    `owns_inputs`: nobody reads them after this module.
    """
    seen: list[Tensor] = []  # the input of each level's Mₖ, last level first
    in_place = owns_inputs and all(segment.kind.changes_input for segments in levels for segment in segments)
    for segments in reversed(levels):
        seen.append(inputs)
        if any(segment.kind.changes_input for segment in segments):
            if not (in_place and inputs.is_contiguous()):  # the base's other modules, or output changes, read them too
                inputs = inputs.clone(memory_format=torch.contiguous_format)
            _change_input(inputs, segments)
    outputs = base_forward(inputs)
    if not outputs.is_contiguous():
        outputs = outputs.contiguous()
    change_outputs(outputs, zip(levels, reversed(seen), strict=True), base_forward)
    return outputs


def change_outputs(
    outputs: Tensor,
    levels: Iterable[tuple[Sequence[Segment], Tensor]],
    base_forward: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Apply each level's segments to `outputs` in place, given the level's inputs; `base_forward` is what relative
    kinds are relative to, for modules that can have them."""
    rows = _as_rows(outputs)
    for level, (segments, inputs) in enumerate(levels):
        seen_rows = _as_rows(inputs)
        for segment in segments:
            tokens, kind, blocks, is_each, kernel = segment
            if kind.changes_input:
                continue
            if kernel is not None and rows.dim() == seen_rows.dim() == 2:
                kernel(seen_rows, rows, tokens, blocks)
                continue
            assert not blocks or not isinstance(blocks[0], RunRows), (
                "a linear module's inputs are one row for each token"
            )
            chosen, seen = _chosen(rows, tokens), _chosen(seen_rows, tokens)
            if kind.is_relative and level and base_forward is not None:
                own = base_forward(seen)
                changed = own.clone(memory_format=torch.contiguous_format)
                _change_output(segment, _grouped(seen, is_each), _grouped(changed, is_each))
                chosen += changed - own
            else:
                _change_output(segment, _grouped(seen, is_each), _grouped(chosen, is_each))
            if isinstance(tokens, Tensor):  # a copy was changed
                rows[tokens] = chosen


def _change_output(segment: Segment, inputs: Tensor, outputs: Tensor) -> None:
    """Change `outputs` `[groups, tokens, out]` in place."""
    kind, blocks = segment.kind, segment.blocks
    if kind.looks_up:
        table, *others = blocks
        looked_up = table.look_up(inputs.flatten()).view(*inputs.shape[:2], -1)
        kind.change_output(inputs, outputs, looked_up, *[block.gather() for block in others])
    else:
        kind.change_output(inputs, outputs, *[block.gather() for block in blocks])


def _change_input(inputs: Tensor, segments: Iterable[Segment]) -> None:
    """In place on a contiguous tensor."""
    rows = _as_rows(inputs)
    for tokens, kind, blocks, is_each, kernel in segments:
        if kind.changes_input and kernel is not None and rows.dim() == 2:
            kernel(rows, rows, tokens, blocks)
        elif kind.changes_input:
            chosen = _chosen(rows, tokens)
            kind.change_input(_grouped(chosen, is_each), *[block.gather() for block in blocks])
            if isinstance(tokens, Tensor):
                rows[tokens] = chosen


def _as_rows(values: Tensor) -> Tensor:
    """`[tokens, width]`; for a norm of each head `[tokens, heads, width]`."""
    match values.dim():
        case 2:
            return values
        case 4:
            return values.flatten(0, 1)
        case _:
            return values.reshape(-1, values.shape[-1])


def _chosen(rows: Tensor, tokens: slice | Tensor) -> Tensor:
    """A view where the tokens are neighbours, else a copy."""
    if isinstance(tokens, Tensor):
        return rows.index_select(0, tokens)
    count = tokens.stop - tokens.start
    return rows if count == rows.shape[0] else rows.narrow(0, tokens.start, count)


def _grouped(tokens: Tensor, is_each: bool) -> Tensor:
    """`[tokens, (heads,) width]` as `[groups, tokens of a group, width]`: heads are like tokens of the group."""
    if tokens.dim() == 2:
        return tokens.unsqueeze(1 if is_each else 0)
    return tokens if is_each else tokens.flatten(0, -2)[None]
