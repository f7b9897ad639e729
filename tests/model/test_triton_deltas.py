"""Triton's kernels for row deltas against the obvious loop: on CUDA, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from server.model import Rows, Segment, TokenRows
from server.model.delta_trial import Named
from server.model.device_deltas import DeviceDeltas, find_device_deltas
from server.model.row_deltas import apply_levels
from tests.model.slow_deltas import SLOW_LAUNCHES

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("torch finds no CUDA device, and TRITON_INTERPRET is not 1", allow_module_level=True)

TOKENS = 6
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def kernels() -> DeviceDeltas:
    from server.model.triton_deltas import LAUNCHES

    return DeviceDeltas(LAUNCHES, DEVICE)


def _pools(*widths: int, dtype: torch.dtype) -> list[Tensor]:
    """One pool, seen as rows of each width, row 0 of each zero."""
    memory = torch.randn(90 * max(widths))
    memory[: max(widths)] = 0
    memory = memory.to(DEVICE, dtype)
    return [memory[: 90 * width].view(90, width) for width in widths]


def _assert_right(kernels: DeviceDeltas, widths: tuple[int, int], segment: Segment) -> None:
    slow = DeviceDeltas(SLOW_LAUNCHES, DEVICE).of(segment.kind)
    fast = kernels.of(segment.kind)
    assert slow is not None
    assert fast is not None
    dtype = segment.blocks[0].pool.dtype
    inputs, outputs = (torch.randn(TOKENS, width).to(DEVICE, dtype) for width in widths)
    actual, expected = outputs.clone(), outputs.clone()
    slow(inputs, expected, segment.tokens, segment.blocks)
    fast(inputs, actual, segment.tokens, segment.blocks)
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCES[dtype] * scale)
    is_kept = (expected == outputs).all(1)
    assert 0 < int(is_kept.sum()) < TOKENS
    assert torch.equal(actual[is_kept], outputs[is_kept])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_low_rank_update_of_each_tokens_own_rows(
    kernels: DeviceDeltas, dtype: torch.dtype, rank: int, is_turned: bool
) -> None:
    torch.manual_seed(rank)
    widths = (77, 131)
    index = torch.randint(20, 90, (2, TOKENS, rank), device=DEVICE)
    index[:, 2] = 0
    if is_turned:  # as padded steps have them
        index = index.transpose(1, 2).contiguous().transpose(1, 2)
    blocks = tuple(map(TokenRows, _pools(*widths, dtype=dtype), index))
    _assert_right(kernels, widths, Segment(slice(0, TOKENS), Named("low_rank"), blocks, is_each=True))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("widths", [(2080, 40), (16, 300)], ids=str)
@pytest.mark.parametrize("tokens", [slice(1, 4), torch.tensor([0, 3, 5], device=DEVICE)], ids=str)
def test_a_low_rank_update_of_one_adapter_and_any_tokens(
    kernels: DeviceDeltas, dtype: torch.dtype, widths: tuple[int, int], tokens: slice | Tensor
) -> None:
    torch.manual_seed(1)
    blocks = tuple(Rows(pool, first, 3) for pool, first in zip(_pools(*widths, dtype=dtype), (61, 83), strict=True))
    _assert_right(kernels, widths, Segment(tokens, Named("low_rank"), blocks, is_each=False))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["scale", "shift"])
@pytest.mark.parametrize("width", [16, 77, 2080])
@pytest.mark.parametrize("tokens", [slice(2, 5), torch.tensor([0, 3, 5], device=DEVICE)], ids=str)
def test_scales_and_shifts(
    kernels: DeviceDeltas, dtype: torch.dtype, name: str, width: int, tokens: slice | Tensor
) -> None:
    torch.manual_seed(2)
    (pool,) = _pools(width, dtype=dtype)
    own = TokenRows(pool, torch.tensor([[7], [0], [89]], device=DEVICE))
    _assert_right(kernels, (width, width), Segment(tokens, Named(name), (own,), is_each=True))
    _assert_right(kernels, (width, width), Segment(tokens, Named(name), (Rows(pool, 7, 1),), is_each=False))


def test_inputs_may_lie_apart(kernels: DeviceDeltas) -> None:
    torch.manual_seed(3)
    inputs = torch.randn(1, 24, TOKENS, device=DEVICE).transpose(1, 2)
    weight = torch.randn(24, 32, device=DEVICE)
    index = torch.randint(5, 90, (2, TOKENS, 3), device=DEVICE)
    kind = Named("low_rank")
    blocks = tuple(map(TokenRows, _pools(24, 32, dtype=torch.float32), index))
    fast, slow = (
        apply_levels(
            lambda given: given @ weight, inputs, [[Segment(slice(0, TOKENS), kind, blocks, True, each.of(kind))]]
        )
        for each in (kernels, DeviceDeltas(SLOW_LAUNCHES, DEVICE))
    )
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_they_are_found_on_a_device(dtype: torch.dtype) -> None:
    found, note = find_device_deltas(DEVICE, dtype)
    assert found is not None, note


@pytest.mark.gpu
def test_a_captured_launch_meets_the_rows_of_its_replay(kernels: DeviceDeltas) -> None:
    torch.manual_seed(4)
    kind, tokens = Named("low_rank"), slice(0, TOKENS)
    pools = _pools(64, 96, dtype=torch.bfloat16)
    index = torch.zeros(2, TOKENS, 8, dtype=torch.int64, device=DEVICE)
    blocks = tuple(map(TokenRows, pools, index))
    inputs = torch.randn(TOKENS, 64, device=DEVICE).bfloat16()
    outputs = torch.zeros(TOKENS, 96, device=DEVICE).bfloat16()
    fast, slow = kernels.of(kind), DeviceDeltas(SLOW_LAUNCHES, DEVICE).of(kind)
    assert fast is not None
    assert slow is not None
    fast(inputs, outputs, tokens, blocks)  # what is compiled at first use is
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        fast(inputs, outputs, tokens, blocks)
    for _ in range(3):
        index.random_(2, 90)
        outputs.zero_()
        expected = outputs.clone()
        graph.replay()
        slow(inputs, expected, tokens, blocks)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
