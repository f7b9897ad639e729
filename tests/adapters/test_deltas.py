"""Each kind of row delta against its one line of mathematics, for groups of tokens at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.adapters.deltas import input_scale, low_rank, output_scale
from server.model import RowDelta

IN, OUT = 7, 5
GROUPS = [(1, 1), (1, 9), (2, 1), (6, 1), (3, 4)]  # groups, tokens of each


def _blocks(deltas: list[RowDelta]) -> list[Tensor]:
    """`[groups, rows, width]` of each block."""
    return [torch.stack(blocks) for blocks in zip(*(delta.blocks for delta in deltas), strict=True)]


@pytest.mark.parametrize(("groups", "tokens"), GROUPS)
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_low_rank_adds_b_a_x(groups: int, tokens: int, rank: int) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(groups, rank, IN), torch.randn(groups, OUT, rank)
    deltas = [low_rank(A[group], B[group].t()) for group in range(groups)]
    inputs, outputs = torch.randn(groups, tokens, IN), torch.randn(groups, tokens, OUT)
    given = inputs.clone()
    expected = [
        [outputs[g, t] + B[g] @ (A[g] @ inputs[g, t]) for t in range(tokens)] for g in range(groups)
    ]  # fmt: skip
    deltas[0].kind.change_output(inputs, outputs, *_blocks(deltas))
    torch.testing.assert_close(outputs, torch.stack([torch.stack(rows) for rows in expected]))
    assert torch.equal(inputs, given)


@pytest.mark.parametrize(("groups", "tokens"), GROUPS)
def test_an_output_scale_multiplies_the_output(groups: int, tokens: int) -> None:
    torch.manual_seed(0)
    scales, outputs = torch.randn(groups, OUT), torch.randn(groups, tokens, OUT)
    inputs = torch.randn(groups, tokens, IN)
    given = inputs.clone()
    deltas = [output_scale(scale) for scale in scales]
    assert not deltas[0].kind.changes_input
    expected = outputs * scales[:, None]
    deltas[0].kind.change_output(inputs, outputs, *_blocks(deltas))
    torch.testing.assert_close(outputs, expected)
    assert torch.equal(inputs, given)


@pytest.mark.parametrize(("groups", "tokens"), GROUPS)
def test_an_input_scale_multiplies_the_input_and_leaves_the_output(groups: int, tokens: int) -> None:
    torch.manual_seed(0)
    scales, inputs = torch.randn(groups, IN), torch.randn(groups, tokens, IN)
    deltas = [input_scale(scale) for scale in scales]
    assert deltas[0].kind.changes_input
    expected = inputs * scales[:, None]
    deltas[0].kind.change_input(inputs, *_blocks(deltas))
    torch.testing.assert_close(inputs, expected)
    outputs = torch.randn(groups, tokens, OUT)
    given = outputs.clone()
    deltas[0].kind.change_output(inputs, outputs, *_blocks(deltas))
    assert torch.equal(outputs, given)


@pytest.mark.parametrize(
    "delta",
    [lambda: low_rank(torch.ones(2, IN), torch.ones(2, OUT)), lambda: output_scale(torch.ones(OUT))],
    ids=["low_rank", "output_scale"],
)
def test_rows_of_zeros_change_no_bit_of_an_output(delta: Callable[[], RowDelta]) -> None:
    kind, blocks = delta().kind, [torch.zeros_like(block).expand(3, -1, -1) for block in delta().blocks]
    inputs, outputs = torch.randn(3, 1, IN), torch.randn(3, 1, OUT)
    given = outputs.clone()
    kind.change_output(inputs, outputs, *blocks)
    assert torch.equal(outputs, given)


def test_rows_of_zeros_change_no_bit_of_an_input() -> None:
    inputs = torch.randn(3, 1, IN)
    given = inputs.clone()
    input_scale(torch.ones(IN)).kind.change_input(inputs, torch.zeros(3, 1, IN))
    assert torch.equal(inputs, given)


def test_kinds_are_equal_by_value() -> None:
    """Adapters of one kind are put together by it."""
    kinds = [
        {low_rank(torch.ones(rank, IN), torch.ones(rank, OUT)).kind for rank in (1, 3)},
        {output_scale(torch.full((OUT,), value)).kind for value in (1.0, 2.0)},
        {input_scale(torch.full((IN,), value)).kind for value in (1.0, 2.0)},
    ]
    assert [len(same) for same in kinds] == [1, 1, 1]
    assert len(set().union(*kinds)) == len(kinds)
