"""The compiled norm and rotation equal torch's, for few numbers and for as many as several threads share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from server.model import fused
from server.model.layer_kernels import LayerKernels


def _near(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 3, 5), (1, 3, 4, 7), (1, 301, 384)])
def test_a_norm_is_torch_s(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    inputs, scale = torch.randn(shape) * 3, torch.randn(shape[-1])
    given = LayerKernels().rms_norm(inputs, scale, 1e-3)
    _near(given, functional.rms_norm(inputs, scale.shape, scale, 1e-3))


def test_a_norm_s_input_may_lie_in_any_order() -> None:
    inputs, scale = torch.randn(1, 6, 4).transpose(1, 2), torch.randn(6)
    _near(LayerKernels().rms_norm(inputs, scale, 1e-6), functional.rms_norm(inputs, (6,), scale, 1e-6))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [4, 50_000])  # of a row that is a piece of work of its own, too
def test_what_is_not_finite_stays_so_and_keeps_to_its_row(width: int) -> None:
    inputs = torch.ones(1, 3, width)
    inputs[0, 1, 2] = torch.nan
    finite = LayerKernels().rms_norm(inputs, torch.ones(width), 1e-6).isfinite().all(-1)
    assert finite.tolist() == [[True, False, True]]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rotary_width", [8, 4, 2])
@pytest.mark.parametrize("tokens", [1, 3, 5000])
@pytest.mark.parametrize("is_projection", [True, False])
def test_a_rotation_is_the_fused_one(rotary_width: int, tokens: int, is_projection: bool) -> None:
    torch.manual_seed(2)
    query, key = torch.randn(1, tokens, 4, 8).transpose(1, 2), torch.randn(1, tokens, 2, 8).transpose(1, 2)
    if not is_projection:
        query, key = query.contiguous(), key.contiguous()
    cos, sin = torch.randn(1, tokens, rotary_width), torch.randn(1, tokens, rotary_width)
    given = LayerKernels().rotate(query, key, cos, sin)
    for each, expected in zip(given, fused.rotate(query, key, cos, sin), strict=True):
        _near(each, expected)


def test_heads_may_be_the_dimension_after_the_tokens() -> None:
    heads, angles = torch.randn(1, 5, 3, 8), torch.randn(1, 5, 8)
    given = LayerKernels().rotate(heads, heads, angles, angles, unsqueeze_dim=2)
    _near(given[0], fused.rotate(heads, heads, angles, angles, unsqueeze_dim=2)[0])


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 2, 3, 8), (1, 3, 16)),  # wider than a head
        ((1, 2, 3, 8), (1, 2, 8)),  # another number of tokens
        ((2, 2, 3, 8), (2, 3, 8)),  # no packed step
    ],
)
def test_a_rotation_of_other_shapes_is_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    heads, angles = (torch.randn(shape) for shape in shapes)
    with pytest.raises(RuntimeError, match="of shape"):
        LayerKernels().rotate(heads, heads, angles, angles)


def test_other_types_and_other_widths_are_refused() -> None:
    kernels, inputs = LayerKernels(), torch.randn(1, 2, 4)
    with pytest.raises(RuntimeError, match="float64"):
        kernels.rms_norm(inputs.double(), torch.ones(4), 1e-6)
    with pytest.raises(RuntimeError, match="weight of shape"):
        kernels.rms_norm(inputs, torch.ones(5), 1e-6)
