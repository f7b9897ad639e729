"""The base's matrix products on a CPU, by oneDNN with weights in its blocked layout.

A weight is reordered once, at load, and takes the place of the original, which is freed: `to_dense` gives it back, bit
by bit. A product over 1 to 64 rows then takes about half the time that it takes over the plain weight, one over
hundreds of rows 5 to 15 % less (two Zen 4 cores, float32). What follows element by element can be fused into it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from server.model.activations import FUSIONS, Activation
from server.model.agreement import agree, random_input

Product = Callable[[Tensor], Tensor]

# The blocked layout is chosen for a number of rows; that of many rows is the best, or as good, for few as well.
_ROWS = 1024
_TRIED_TOKENS = (1, 13)


def can_pack(module: nn.Module) -> bool:
    """Whether a linear module's product can run over a packed weight."""
    if type(module) is not nn.Linear and type(module) is not Conv1D:  # a subclass may do more than the product
        return False
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    match weight.dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        case _:
            return False


@torch.inference_mode()
def pack(module: nn.Module) -> Product | None:
    """Reorder a module's weight (`can_pack`) and return its product, y = x Wᵀ + b; None, and all is as it was, where
    the reordered weight gives other products than the plain one."""
    weight: Tensor = module.weight  # type: ignore[assignment]  # a module's attributes are untyped
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    dense = weight.detach().t() if isinstance(module, Conv1D) else weight.detach()
    packed = torch.ops.mkldnn._reorder_linear_weight(dense.contiguous(), _ROWS)
    linear = torch.ops.mkldnn._linear_pointwise  # here and below: a torch without oneDNN has no such name

    def product(inputs: Tensor) -> Tensor:
        outputs: Tensor = linear(inputs, packed, bias, "none", [], "")
        return outputs

    for tokens in _TRIED_TOKENS:
        inputs = random_input(tokens, dense.shape[1], dtype=weight.dtype)
        if not agree(product(inputs), functional.linear(inputs, dense, bias)):
            return None
    module.weight = nn.Parameter(packed, requires_grad=False)
    return product


def may_be_blocked(weight: Tensor, block: int) -> bool:
    """Whether a packed weight `[out, in]` has the bytes of `[blocks, in, block]`, the last block of outputs filled up.
    That it is laid out so only its product can tell."""
    outputs, inputs = weight.shape
    size = -(-outputs // block) * block * inputs * weight.itemsize
    return weight.dtype == torch.float32 and int(torch.ops.mkldnn._nbytes(weight)) == size


def address(tensor: Tensor) -> int:
    """Of a contiguous tensor's numbers, or of a packed weight's."""
    return int(torch.ops.mkldnn.data_ptr(tensor)) if tensor.is_mkldnn else tensor.data_ptr()


def activated(module: nn.Module, activation: Activation) -> Product:
    """A packed module's product with an activation fused into it: f(x Wᵀ + b)."""
    linear = torch.ops.mkldnn._linear_pointwise
    name, algorithm = FUSIONS[activation]

    def product(inputs: Tensor) -> Tensor:
        outputs: Tensor = linear(inputs, module.weight, module.bias, name, [], algorithm)
        return outputs

    return product


def multiplied(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A packed module's product times another tensor, element by element: (x Wᵀ + b) ⊙ z."""
    linear = torch.ops.mkldnn._linear_pointwise.binary

    def product(inputs: Tensor, factor: Tensor) -> Tensor:
        outputs: Tensor = linear(inputs, factor, module.weight, module.bias, "mul")
        return outputs

    return product


def dense_weight(module: nn.Module) -> Tensor:
    """The weight `[out, in]` of a linear module, packed or not."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]  # as above
    if weight.is_mkldnn:
        return weight.to_dense()
    return weight.t() if isinstance(module, Conv1D) else weight
