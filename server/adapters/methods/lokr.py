"""LoKr: an update that is a Kronecker product of two small matrices.

Edalati et al., "KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022; as LoKr: Yeh et al., "Navigating
Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024.
Checkpoint (PEFT `LOKR`): per targeted module `lokr_w1` `[a, c]` and `lokr_w2` `[b, d]` with ab = out and cd = in, each
whole or as its factors `_a` `[…, rank]` and `_b` `[rank, …]`: y = Wx + b + s (w1 ⊗ w2) x with s = alpha / rank.

It is served exactly and never expanded beyond w1 itself: (w1 ⊗ w2) x = w1 X w2ᵀ, where X is x as `[c, d]`.
"""

from __future__ import annotations

from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import kronecker
from server.adapters.method import Adapter, MethodFacts
from server.adapters.methods.ranks import RANK_KEYS, module_alpha, module_rank
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, RowDelta

NAME = "lokr"
PEFT_TYPE = "LOKR"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: Kronecker product",
    formats=("PEFT LOKR",),
    parameters="ac + bd for each targeted module with in = cd, out = ab; less with w1 or w2 in two factors",
    cost="two or three small matrix products at each targeted module",
)

_USED = (*RANK_KEYS, "alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_TRAINING_ONLY = (
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
    "init_weights",
    "use_effective_conv2d",
    "decompose_both",  # the tensors that there are say it
    "decompose_factor",  # their shapes say it
)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=("modules_to_save",))
    deltas = {name: _update(checkpoint, base, name) for name in targeted_sites(checkpoint, base)}
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _update(checkpoint: Checkpoint, base: BaseShape, name: str) -> RowDelta:
    site, key = base.sites[name], f"{KEY_PREFIX}{name}.lokr"
    rank = module_rank(checkpoint, name)
    left = _matrix(checkpoint, f"{key}_w1", rank)  # [a, c], or [a, rank] and [rank, c]
    right = _matrix(checkpoint, f"{key}_w2", rank)  # [b, d], or [b, rank] and [rank, d]
    outputs, inputs = len(left[0]) * len(right[0]), left[-1].shape[1] * right[-1].shape[1]
    if (inputs, outputs) != (site.inputs, site.outputs):
        needed = f"this base needs [{site.outputs}, {site.inputs}]"
        message = f"{key}_w1 and {key}_w2 make [{outputs}, {inputs}] where {needed}"
        raise AdapterError("base_mismatch", message, f"{key}_w1")
    if len(right) == 2 and rank > min(len(right[0]), right[1].shape[1]):  # then the product is the smaller one
        right = [checkpoint.finite(f"{key}_w2_a", _product(right).to(base.dtype))]
    checkpoint.expand(f"{key}_w1", len(left[0]) * left[-1].shape[1])
    scaled = _product(left) * (module_alpha(checkpoint, name, "alpha") / rank)
    return kronecker(checkpoint.finite(f"{key}_w1", scaled.to(base.dtype)), *(each.t() for each in reversed(right)))


def _product(factors: list[Tensor]) -> Tensor:
    """In float32."""
    first, *rest = (factor.float() for factor in factors)
    return first @ rest[0] if rest else first


def _matrix(checkpoint: Checkpoint, key: str, rank: int) -> list[Tensor]:
    """A matrix, whole or as its two factors."""
    if f"{key}_a" in checkpoint.names:
        return [checkpoint.take(f"{key}_a", (None, rank)), checkpoint.take(f"{key}_b", (rank, None))]
    return [checkpoint.take(key, (None, None))]
