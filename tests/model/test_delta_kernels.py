"""The compiled row deltas against the kinds that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.adapters.deltas import input_scale, low_rank, output_scale, shift
from server.model import DeltaKind, Rows, Segment, TokenRows
from server.model.delta_kernels import DeltaKernels
from server.model.delta_trial import worst_difference
from server.model.row_deltas import apply_levels

WIDTH, RANK, TOKENS = 24, 3, 40
KINDS = {
    "output scale": (output_scale(torch.ones(WIDTH)).kind, 1, 1),
    "input scale": (input_scale(torch.ones(WIDTH)).kind, 1, 1),
    "shift": (shift(torch.ones(WIDTH)).kind, 1, 1),
    "low rank": (low_rank(torch.ones(RANK, WIDTH), torch.ones(RANK, WIDTH)).kind, 2, RANK),
}


def _changed(segment: Segment, inputs: Tensor, weight: Tensor) -> Tensor:
    return apply_levels(lambda given: given @ weight, inputs.clone(), [[segment]])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tokens", [slice(0, TOKENS), slice(5, 9), torch.tensor([3, 0, 17, 39])], ids=str)
@pytest.mark.parametrize("is_each", [False, True])
def test_a_kernel_computes_what_its_kind_does(name: str, tokens: slice | Tensor, is_each: bool) -> None:
    kind, count, height = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(100, WIDTH, generator=generator)
    inputs, weight = torch.randn(1, TOKENS, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator)
    blocks: tuple[Rows, ...] | tuple[TokenRows, ...]
    if is_each:
        chosen = len(range(TOKENS)[tokens]) if isinstance(tokens, slice) else len(tokens)
        indices = torch.randint(0, 100, (count, chosen, height), generator=generator)
        blocks = tuple(TokenRows(pool, index) for index in indices)
    else:
        blocks = tuple(Rows(pool, 7 + 11 * place, height) for place in range(count))
    kernel = DeltaKernels().of(kind)
    assert kernel is not None
    own = _changed(Segment(tokens, kind, blocks, is_each), inputs, weight)
    compiled = _changed(Segment(tokens, kind, blocks, is_each, kernel), inputs, weight)
    assert not torch.equal(own, inputs @ weight)
    torch.testing.assert_close(compiled, own, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("threads")
def test_inputs_may_lie_apart() -> None:
    kind, count, height = KINDS["low rank"]
    pool, weight = torch.randn(100, WIDTH), torch.randn(WIDTH, WIDTH)
    inputs = torch.randn(1, WIDTH, TOKENS).transpose(1, 2)
    blocks = tuple(Rows(pool, 7 + 11 * place, height) for place in range(count))
    compiled, own = (
        apply_levels(
            lambda given: given @ weight,
            inputs,
            [[Segment(slice(0, TOKENS), kind, blocks, is_each=False, kernel=kernel)]],
        )
        for kernel in (DeltaKernels().of(kind), None)
    )
    torch.testing.assert_close(compiled, own, rtol=1e-5, atol=1e-4)


def test_other_kinds_have_none() -> None:
    assert DeltaKernels().of(DeltaKind()) is None


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["scale", "shift", "low_rank"])
def test_they_pass_the_trial_of_a_devices_kernels(name: str) -> None:
    assert worst_difference(DeltaKernels(), name, torch.float32, torch.device("cpu")) < 1e-5
