"""RoAd: the outputs of modules rotated and stretched, two by two.

Liao and Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", NeurIPS
2024. Checkpoint (PEFT `ROAD`): per targeted module `road_theta` θ and `road_alpha` α, `[out / 2]`, `[out]` or
`[2 · out]` by `variant` road_1, road_2 or road_4. In each group of `group_size` outputs value i and value
i + group_size/2 are a pair (y₁, y₂):

    (c₁ y₁ - s₁ y₂, c₂ y₂ + s₂ y₁)      c = α cos θ, s = α sin θ

road_1: both have one c and s; road_2: each its own; road_4: the first half of a group's θ and α is for c, the second
for s.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, DeltaKind, RowDelta

NAME = "road"
PEFT_TYPE = "ROAD"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: rotation of outputs",
    formats=("PEFT ROAD",),
    parameters="out for each targeted module (road_1), 2·out (road_2) or 4·out (road_4); resident 2·out",
    cost="two multiplications of each targeted module's output",
)
_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # of θ, in outputs


@dataclass(frozen=True)
class _Rotation(DeltaKind):
    group: int

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        straight, across = blocks  # [groups, 1, out]: c - 1, and s with the sign of what it multiplies
        pairs = outputs.view(*outputs.shape[:-1], -1, 2, self.group // 2)
        outputs.add_(pairs.flip(-2).flatten(-3) * across + outputs * straight)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(
        used=("variant", "group_size", "target_modules"),
        training_only=("init_weights",),
        unsupported=("modules_to_save",),
    )
    variant, group = checkpoint.config.get("variant", "road_1"), checkpoint.integer("group_size")
    if not isinstance(variant, str) or variant not in _SIZES:
        raise AdapterError("bad_config", f"variant is {variant!r}; {', '.join(_SIZES)} are known", "variant")
    deltas: dict[str, RowDelta] = {}
    for name in targeted_sites(checkpoint, base):
        outputs, key = base.sites[name].outputs, f"{KEY_PREFIX}{name}.road_"
        if group % 2 or outputs % group:
            message = f"group_size is {group}; it must be even and divide the {outputs} outputs of {name}"
            raise AdapterError("base_mismatch", message, "group_size")
        size = (int(outputs * _SIZES[variant]),)
        theta, alpha = checkpoint.take(f"{key}theta", size), checkpoint.take(f"{key}alpha", size)
        deltas[name] = _rotation(variant, group, theta.float(), alpha.float(), alpha)
        for block in deltas[name].blocks:
            checkpoint.finite(f"{key}alpha", block)
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _rotation(variant: str, group: int, theta: Tensor, alpha: Tensor, like: Tensor) -> RowDelta:
    """The delta of one module, in the dtype of `like`."""
    cosine, sine = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_1":
        cosine, sine = (part.view(-1, 1, group // 2).expand(-1, 2, -1) for part in (cosine, sine))
    elif variant == "road_4":
        cosine, sine = cosine.view(-1, 2, group)[:, 0], sine.view(-1, 2, group)[:, 1]
    signed = sine.reshape(-1, 2, group // 2).clone()
    signed[:, 0].neg_()
    rows = (cosine.reshape(1, -1) - 1, signed.view(1, -1))
    return RowDelta(_Rotation(group), tuple(row.to(like.dtype).contiguous() for row in rows))
