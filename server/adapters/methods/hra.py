"""HRA: the inputs of modules through a chain of reflections.

Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
NeurIPS 2024. Checkpoint (PEFT `HRA`): per targeted module `hra_u` `[in, r]`, whose columns, divided by their lengths,
are u₁ … u_r: y = W H x + b with H = (1 - 2u₁u₁ᵀ) … (1 - 2u_r u_rᵀ). With `apply_GS` the columns are made orthogonal
first.

H - 1 has rank r: it is Σ vₖ uₖᵀ with vₖ = -2 (1 - 2u₁u₁ᵀ) … (1 - 2uₖ₋₁uₖ₋₁ᵀ) uₖ, so x becomes x + Σ vₖ (uₖ · x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, DeltaKind, RowDelta

NAME = "hra"
PEFT_TYPE = "HRA"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: reflections of inputs",
    formats=("PEFT HRA",),
    parameters="r·in for each targeted module; resident twice that",
    cost="two thin matrix products at each targeted module, as LoRA",
)
_USED = ("r", "apply_GS", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class _InputLowRank(DeltaKind):
    changes_input = True

    def change_input(self, inputs: Tensor, *blocks: Tensor) -> None:
        down, up = blocks  # [groups, r, in] each
        inputs.baddbmm_(inputs @ down.transpose(1, 2), up)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=("init_weights",), unsupported=("bias", "modules_to_save"))
    rank, is_orthogonal = checkpoint.integer("r"), checkpoint.config.get("apply_GS", False)
    if not isinstance(is_orthogonal, bool):
        raise AdapterError("bad_config", f"apply_GS is {is_orthogonal!r}; it must be true or false", "apply_GS")
    deltas: dict[str, RowDelta] = {}
    for name in targeted_sites(checkpoint, base):
        key = f"{KEY_PREFIX}{name}.hra_u"
        if rank > base.sites[name].inputs:  # the time that reading takes grows with its square
            message = f"r is {rank}; more than the {base.sites[name].inputs} inputs of {name} make nothing new of it"
            raise AdapterError("base_mismatch", message, "r")
        columns = checkpoint.take(key, (base.sites[name].inputs, rank))
        blocks = [block.to(columns.dtype) for block in _reflections(columns.double().t(), is_orthogonal)]
        deltas[name] = RowDelta(_InputLowRank(), tuple(checkpoint.finite(key, block) for block in blocks))
    checkpoint.close()
    return Adapter(
        method=NAME,
        deltas=deltas,
        parameters=checkpoint.parameters,
        rank=rank,
        warnings=tuple(checkpoint.warnings),
    )


def _reflections(rows: Tensor, is_orthogonal: bool) -> tuple[Tensor, Tensor]:
    """u and v of the module, `[r, in]` each."""
    down, up = torch.zeros_like(rows), torch.zeros_like(rows)
    for k, row in enumerate(rows):
        own = row / row.norm()
        if is_orthogonal:
            own = row - down[:k].t() @ (down[:k] @ row)
            own = own / own.norm()
        down[k] = own
        up[k] = -2 * (own + up[:k].t() @ (down[:k] @ own))
    return down, up
