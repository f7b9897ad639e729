"""The base's norms, found by trying: what each makes of its input before its weight is applied.

A norm here gives (w + c) ⊙ n(x) + b for its weight w, where c is 0 or, as Gemma has it, 1, and n divides x by its root
mean square, less its mean before that where the norm is centred. Since c drops out of a difference, a trained weight
w' adds (w' - w) ⊙ n(x). No class is known by name: a module that does not behave so is no norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from server.model.agreement import random_input

OFFSETS = (0.0, 1.0)
"""What classes add to a norm's weight."""
_TRIALS = 5  # rows of random input
_TOLERANCE = {torch.float32: 1e-4}  # of the largest value
_LOW_PRECISION_TOLERANCE = 3e-2


@dataclass(frozen=True)
class NormForm:
    """n(x) = (x - mean) / √(variance + epsilon) (Ba et al. 2016) where centred, else x / √(mean of x² + epsilon)
    (Zhang and Sennrich 2019)."""

    epsilon: float
    is_centred: bool

    def normalized(self, inputs: Tensor) -> Tensor:
        """n of each row of `[…, width]`, in its dtype, computed in float32 as the classes do."""
        width, values = inputs.shape[-1:], inputs.float()
        if self.is_centred:
            return functional.layer_norm(values, width, eps=self.epsilon).to(inputs.dtype)
        return functional.rms_norm(values, width, eps=self.epsilon).to(inputs.dtype)


@torch.inference_mode()
def find_norms(model: nn.Module) -> Iterator[tuple[str, NormForm]]:
    """Every norm's name and form; before any module's `forward` is replaced."""
    for name, module in model.named_modules():
        parts = weight_and_epsilon(module)
        if parts is None:
            continue
        weight, epsilon = parts
        for is_centred in (False, True):
            form = NormForm(epsilon, is_centred)
            if _behaves(module, weight, form):
                yield name, form
                break


def weight_and_epsilon(module: object) -> tuple[Tensor, float] | None:
    """The weight `[width]` and the epsilon of what may be a norm, by the names that classes have for them."""
    weight = getattr(module, "weight", None)
    epsilons = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    epsilon = next((value for value in epsilons if isinstance(value, float)), None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or epsilon is None:
        return None
    return weight.detach().contiguous(), epsilon


def _behaves(module: nn.Module, weight: Tensor, form: NormForm) -> bool:
    """Whether another weight changes the module's output as the form says."""
    inputs = random_input(1, _TRIALS, len(weight), dtype=weight.dtype, device=weight.device) + 0.5
    change = random_input(len(weight), dtype=weight.dtype, device=weight.device)
    try:
        own = module(inputs)
        changed = functional_call(module, {"weight": weight + change}, (inputs,))
    except (RuntimeError, TypeError, ValueError, AttributeError):  # a module of another kind
        return False
    if not isinstance(own, Tensor) or own.shape != inputs.shape:
        return False
    expected = change.float() * form.normalized(inputs).float()
    scale = max(float(expected.abs().max()), float(own.float().abs().max()), 1.0)
    tolerance = _TOLERANCE.get(own.dtype, _LOW_PRECISION_TOLERANCE)
    return float((changed.float() - own.float() - expected).abs().max()) <= scale * tolerance
