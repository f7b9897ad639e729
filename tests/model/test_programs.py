"""Products by a program equal torch's; what is not laid out for it keeps torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from server.model import products
from server.model.activations import Activation
from server.model.program_kernels import MOST_TOKENS
from server.model.programs import Programs
from tests.model.packed import for_many_tokens, packed

pytestmark = pytest.mark.usefixtures("blocked_weights")

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SWISH: functional.silu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.GELU: functional.gelu,
    Activation.RELU: functional.relu,
}
WIDTHS = [(16, 64), (48, 200), (384, 70), (1024, 5)]  # of input and output: whole blocks of 64, others, less than one
TOKENS = [each for each in (1, 2, 3, 4, 6, 7, 13, 47, 48, 97, 301) if each <= MOST_TOKENS]


class _Own:
    """torch's own product, until it is forbidden."""

    def __init__(self, product: products.Product) -> None:
        self.product = product
        self.is_allowed = True

    def __call__(self, inputs: Tensor) -> Tensor:
        assert self.is_allowed, "torch's own product ran"
        return self.product(inputs)


class _Packed:
    """A module with a packed weight, and the answer that it must give."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        torch.manual_seed(inputs + outputs)
        self.module = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
        self.weight = self.module.weight.clone()
        self.product = packed(self.module)

    def expected(self, inputs: Tensor) -> Tensor:
        bias = self.module.bias
        answer = inputs.double() @ self.weight.double().t() + (0 if bias is None else bias.double())
        return answer.float()


def _program(packed: _Packed) -> products.Product:
    """The product by a program, which must not ask torch once it is there."""
    own = _Own(packed.product)
    program = Programs().product(packed.module, own)
    own.is_allowed = False
    return program


def _near(given: Tensor, expected: Tensor) -> None:
    assert given.shape == expected.shape
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@torch.inference_mode()
def test_a_product_is_torch_s(widths: tuple[int, int], bias: bool) -> None:
    packed = _Packed(*widths, bias=bias)
    program = _program(packed)
    for tokens in TOKENS:
        inputs = torch.randn(1, tokens, widths[0])
        _near(program(inputs), packed.expected(inputs))
        _near(program(inputs[0]), packed.expected(inputs[0]))


@for_many_tokens
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_a_token_s_product_is_the_same_to_the_bit_in_every_company() -> None:
    program = _program(_Packed(384, 200))
    inputs = torch.randn(301, 384)
    together = program(inputs)
    for start, stop in ((0, 1), (7, 9), (100, 105), (13, 300)):
        assert torch.equal(program(inputs[start:stop]), together[start:stop])


@torch.inference_mode()
def test_inputs_may_lie_in_any_order() -> None:
    packed = _Packed(48, 200)
    inputs = torch.randn(48, 3).t()
    _near(_program(packed)(inputs), packed.expected(inputs))


@pytest.mark.parametrize("tokens", [0, MOST_TOKENS + 1])
@torch.inference_mode()
def test_no_tokens_and_too_many_are_torch_s_own(tokens: int) -> None:
    packed = _Packed(48, 200)
    inputs = torch.randn(1, tokens, 48)
    with pytest.raises(AssertionError, match="torch's own product ran"):
        _program(packed)(inputs)
    _near(Programs().product(packed.module, packed.product)(inputs), packed.expected(inputs))


@pytest.mark.parametrize("widths", [(20, 64), (7, 64)], ids=str)
@torch.inference_mode()
def test_a_weight_that_is_laid_out_otherwise_keeps_torch_s_own_product(widths: tuple[int, int]) -> None:
    packed = _Packed(*widths)
    assert Programs().product(packed.module, packed.product) is packed.product


@torch.inference_mode()
def test_other_widths_and_types_are_refused_as_torch_refuses_them() -> None:
    packed = _Packed(48, 200)
    program = Programs().product(packed.module, packed.product)
    for inputs in (torch.randn(3, 16), torch.randn(3, 48).to(torch.bfloat16)):
        with pytest.raises(RuntimeError):
            program(inputs)


@torch.inference_mode()
def test_what_gives_another_answer_is_not_used() -> None:
    packed = _Packed(48, 200)

    def other(inputs: Tensor) -> Tensor:
        return packed.product(inputs) * 1.0001

    assert Programs().product(packed.module, other) is other


@torch.inference_mode()
def test_a_token_that_is_not_finite_hurts_no_other() -> None:
    inputs = torch.randn(4, 384)
    inputs[1, 7], inputs[2, 9] = torch.nan, torch.inf
    finite = _program(_Packed(384, 70))(inputs).isfinite().all(-1)
    assert finite.tolist() == [True, False, False, True]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: each.name)
@torch.inference_mode()
def test_gated_products_are_torch_s(activation: Activation, widths: tuple[int, int]) -> None:
    gate, up = _Packed(*widths), _Packed(*widths, bias=False)

    def expected(inputs: Tensor) -> Tensor:
        return ACTIVATIONS[activation](gate.expected(inputs)) * up.expected(inputs)

    own = _Own(expected)
    gated = Programs().gated(gate.module, up.module, activation, own)
    own.is_allowed = False
    for tokens in TOKENS:
        inputs = 3 * torch.randn(1, tokens, widths[0])
        _near(gated(inputs), expected(inputs))


@torch.inference_mode()
def test_gated_products_of_unequal_widths_keep_torch_s_own() -> None:
    gate, up = _Packed(48, 200), _Packed(48, 136)
    own = _Own(gate.product)
    assert Programs().gated(gate.module, up.module, Activation.RELU, own) is own
