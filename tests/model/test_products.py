"""Products over packed weights, against torch's own over the weights as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from server.model import Sites, products
from server.model.activations import Activation
from server.model.agreement import agree
from tests.model.packed import packed

IN, OUT = 40, 24
ROWS = [0, 1, 5, 64, 300]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # of the largest value; bfloat16 keeps 8 bits
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SWISH: functional.silu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.GELU: functional.gelu,
    Activation.RELU: functional.relu,
}


def _linear(dtype: torch.dtype) -> nn.Module:
    return nn.Linear(IN, OUT).to(dtype)


def _without_bias(dtype: torch.dtype) -> nn.Module:
    return nn.Linear(IN, OUT, bias=False).to(dtype)


def _transposed(dtype: torch.dtype) -> nn.Module:
    module: nn.Module = Conv1D(OUT, IN)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(dtype)


MODULES = [_linear, _without_bias, _transposed]
Make = Callable[[torch.dtype], nn.Module]


def _packable(make: Make, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A module to be packed, and its like that stays."""
    torch.manual_seed(5)
    module = make(dtype)
    if not products.can_pack(module):
        assert dtype != torch.float32, "float32 products are packed on every processor"
        pytest.skip(f"this processor has no products in {dtype}")
    return module, copy.deepcopy(module)


def _assert_close(given: Tensor, expected: Tensor) -> None:
    """`expected` is in float32, rounded once at most."""
    assert given.shape == expected.shape
    if given.numel():
        difference = float((given.float() - expected).abs().max())
        assert difference <= float(expected.abs().max()) * TOLERANCE[given.dtype]


def _expected(plain: nn.Module, inputs: Tensor) -> Tensor:
    answer: Tensor = plain.float()(inputs.float())
    return answer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", MODULES)
@torch.inference_mode()
def test_a_packed_product_is_the_modules_own(make: Make, rows: int, dtype: torch.dtype) -> None:
    module, plain = _packable(make, dtype)
    inputs = torch.randn(1, rows, IN).to(dtype)
    outputs = packed(module)(inputs)
    assert outputs.dtype == dtype
    _assert_close(outputs, _expected(plain, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", MODULES)
@torch.inference_mode()
def test_an_activation_fused_in_is_the_activation_of_the_product(make: Make, rows: int, dtype: torch.dtype) -> None:
    module, plain = _packable(make, dtype)
    packed(module)
    inputs = (3 * torch.randn(1, rows, IN)).to(dtype)
    for activation, function in ACTIVATIONS.items():
        outputs = products.activated(module, activation)(inputs)
        assert outputs.dtype == dtype
        _assert_close(outputs, function(_expected(plain, inputs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", MODULES)
@torch.inference_mode()
def test_a_factor_fused_in_multiplies_the_product(make: Make, rows: int, dtype: torch.dtype) -> None:
    module, plain = _packable(make, dtype)
    packed(module)
    inputs, factor = torch.randn(1, rows, IN).to(dtype), torch.randn(1, rows, OUT).to(dtype)
    given = factor.clone()
    outputs = products.multiplied(module)(inputs, factor)
    assert outputs.dtype == dtype
    assert torch.equal(factor, given)
    _assert_close(outputs, _expected(plain, inputs) * factor.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MODULES)
def test_the_weight_comes_back_bit_by_bit_and_nothing_is_lost(make: Make, dtype: torch.dtype) -> None:
    module, plain = _packable(make, dtype)
    original = products.dense_weight(plain)
    assert original.shape == (OUT, IN)
    packed(module)
    assert torch.equal(products.dense_weight(module), original)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in module.named_parameters()] == names
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == sum(parameter.numel() for parameter in plain.parameters())


def test_only_plain_linear_modules_on_a_cpu_in_a_floating_dtype_are_packed() -> None:
    class Own(nn.Linear):
        """May do more than the product."""

    class OwnTransposed(Conv1D):  # type: ignore[misc]  # transformers is untyped
        """Likewise."""

    assert not products.can_pack(Own(IN, OUT))
    assert not products.can_pack(OwnTransposed(OUT, IN))
    assert not products.can_pack(nn.LayerNorm(IN))
    assert not products.can_pack(nn.Linear(IN, OUT).double())
    assert not products.can_pack(nn.Linear(IN, OUT, device="meta"))


@torch.inference_mode()
def test_a_packed_weight_that_gives_other_products_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(IN, OUT)
    weight, inputs = module.weight, torch.randn(3, IN)
    expected = module(inputs)
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda dense, rows: reorder(dense * (1 + 1e-4), rows)
    )
    assert products.pack(module) is None
    assert module.weight is weight
    sites = Sites(nn.ModuleDict({"only": module}), None)
    assert not sites.is_packed(module)
    assert torch.equal(module(inputs), expected)


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_nothing_agrees_with_what_is_not_finite(wrong: float) -> None:
    own = torch.tensor([1.0, wrong])
    assert not agree(torch.tensor([1.0, 2.0]), own)
    assert not agree(own, own.clone())
    assert not agree(own, torch.tensor([1.0, 2.0]))
