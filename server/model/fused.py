"""Faster forms of what stands between a base's matrix products, each kept only where it gives what the class's own code
gives.

A form is tried on random input against the module's own forward when the base is loaded; where they differ by more than
rounding, or the class does not look as expected, its own code stays. Nothing here knows a class by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.model import products
from server.model.activations import known_activation
from server.model.agreement import MAGNITUDES, agree, random_input
from server.model.norms import OFFSETS, weight_and_epsilon
from server.model.sites import Sites

if TYPE_CHECKING:
    from server.model.layer_kernels import LayerKernels
    from server.model.programs import Programs

_TRIED_TOKENS = 9  # programs have trials of their own, in which they are compared with what is tried here
RmsNorm = Callable[[Tensor, Tensor, float], Tensor]  # of inputs, with a scale and an epsilon
Rotation = Callable[..., tuple[Tensor, Tensor]]  # `rotate`
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)
_ROTARY = "apply_rotary_pos_emb"  # what transformers' modules call the function that rotates queries and keys


@torch.inference_mode()
def fuse(model: nn.Module, sites: Sites, kernels: LayerKernels | None = None, programs: Programs | None = None) -> None:
    """Replace the forward of modules for which a faster equal form is known."""
    embedding = next(model.parameters())
    rms_norm = _rms_norm if kernels is None else kernels.rms_norm
    rotation = rotate if kernels is None else kernels.rotate
    for name, module in model.named_modules():
        for candidate, width in [*_norms(module, rms_norm), *_gated_mlps(name, module, sites, programs)]:
            inputs = random_input(1, _TRIED_TOKENS, width, dtype=embedding.dtype, device=embedding.device)
            if all(agree(candidate(inputs * scale), module.forward(inputs * scale)) for scale in MAGNITUDES):
                module.forward = candidate
                if f"{name}.down_proj" in sites.shapes:
                    sites.give_inputs(f"{name}.down_proj")  # f(gate(x)) ⊙ up(x) goes nowhere else
                break
        _fuse_rotation(module, rotation, embedding.dtype)


def _norms(module: nn.Module, rms_norm: RmsNorm) -> Iterator[tuple[Callable[[Tensor], Tensor], int]]:
    """Root mean square norms (Zhang and Sennrich 2019), their weight as it is or, as Gemma has it, less one."""
    parts = weight_and_epsilon(module)
    if parts is None:
        return
    weight, epsilon = parts
    if len(inspect.signature(module.forward).parameters) != 1 or isinstance(module, _OTHER_NORMS):
        return
    # a class adds its offset in float32; below that the sum would lose digits
    offsets = OFFSETS if weight.dtype == torch.float32 else OFFSETS[:1]
    for offset in offsets:
        scale = weight + offset if offset else weight

        def norm(inputs: Tensor, scale: Tensor = scale) -> Tensor:
            return rms_norm(inputs, scale, epsilon)

        yield norm, len(weight)


def _rms_norm(inputs: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(inputs, scale.shape, scale, epsilon)


def _gated_mlps(
    name: str, module: nn.Module, sites: Sites, programs: Programs | None
) -> Iterator[tuple[Callable[[Tensor], Tensor], int]]:
    """down(f(gate(x)) ⊙ up(x)), the activation and the product fused into the first two."""
    gate, up, down = (getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj"))
    if not (sites.is_packed(gate) and sites.is_packed(up) and isinstance(down, nn.Module)):
        return
    assert isinstance(gate, nn.Module)
    assert isinstance(up, nn.Module)
    activation = known_activation(getattr(module, "act_fn", None))
    if activation is None:
        return
    own = module.forward
    touched = (f"{name}.gate_proj", f"{name}.up_proj")
    times_up = products.multiplied(up)
    activated_gate = products.activated(gate, activation)

    def gated(inputs: Tensor) -> Tensor:
        return times_up(inputs, activated_gate(inputs))

    inner = gated if programs is None else programs.gated(gate, up, activation, gated)

    def mlp(inputs: Tensor) -> Tensor:
        outputs: Tensor = own(inputs) if sites.touches(touched) else down(inner(inputs))
        return outputs

    yield mlp, gate.in_features  # type: ignore[misc]


def _fuse_rotation(module: nn.Module, rotation: Rotation, dtype: torch.dtype) -> None:
    """Give an attention module's forward, otherwise as it is, a rotation in fewer passes over memory."""
    forward = type(module).forward
    own = getattr(forward, "__globals__", {}).get(_ROTARY)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if _ROTARY not in names or not _rotates_alike(own, rotation, dtype):
        return
    changed = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: rotation},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(changed, module)


def _rotates_alike(own: Any, rotation: Rotation, dtype: torch.dtype) -> bool:
    """Whether a class's function is `rotate`, in signature, values and types; some turn by angles in float32 whatever
    the type of the heads."""
    if not callable(own) or list(inspect.signature(own).parameters) != list(inspect.signature(rotate).parameters):
        return False
    query, key = torch.randn(1, 4, 3, 8).to(dtype), torch.randn(1, 2, 3, 8).to(dtype)
    for width in (query.shape[-1], query.shape[-1] // 2):
        for angles in {dtype, torch.float32}:
            cos, sin = torch.randn(1, 3, width).to(angles), torch.randn(1, 3, width).to(angles)
            try:
                rotated = own(query, key, cos, sin)
            except (RuntimeError, TypeError, ValueError):
                return width < query.shape[-1]  # one that knows no other width is never asked for it
            fused = rotation(query, key, cos, sin)
            if not all(agree(each, given) for each, given in zip(fused, rotated, strict=True)):
                return False
    return True


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021), each dimension paired with the one half a head further.

    `q`, `k` `[1, heads, tokens, head_dim]`, `cos`, `sin` `[1, tokens, width]`; dimensions from `width` on stay.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    if width < heads.shape[-1]:
        return torch.cat([_rotated(heads[..., :width], cos, sin), heads[..., width:]], -1)
    half = width // 2
    rotated = heads * cos
    rotated[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return rotated
