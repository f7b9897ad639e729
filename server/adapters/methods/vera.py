"""VeRA: low-rank updates whose two matrices are random and the same for all modules and tasks; vectors are trained.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024.
Checkpoint (PEFT `VERA`): `base_model.vera_A` `[rank, widest in]` and `base_model.vera_B` `[widest out, rank]`, widest
among the targeted modules; per module `vera_lambda_d` `[rank]` and `vera_lambda_b` `[out]`:
y = Wx + b + λ_b ⊙ (B (λ_d ⊙ (A x))), with the first `in` columns of A and the first `out` rows of B. A and B are kept
once for all adapters with the same ones, which is what makes an adapter small and many of them one matrix product.

Without `save_projection` A and B are drawn anew from `projection_prng_key`, in the way of PEFT and torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.shared import SharedMatrices, SharingKind, shared_matrices
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, RowDelta

NAME = "vera"
PEFT_TYPE = "VERA"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: low rank, matrices shared by tasks",
    formats=("PEFT VERA",),
    parameters="r + out for each targeted module",
    cost="two thin matrix products at each targeted module, of all tasks with the same matrices at once",
)

_USED = ("r", "projection_prng_key", "save_projection", "target_modules", "layers_to_transform", "layers_pattern")
_TRAINING_ONLY = ("vera_dropout", "d_initial", "init_weights", "fan_in_fan_out")
_KEYS = 2**64  # numbers that torch takes as a seed, negative ones from half of them on
_LARGEST_DRAWN_RANK = 2**14  # what a few bytes of config may ask for in memory has a bound


@dataclass(frozen=True)
class Projected(SharingKind):
    """y ← y + λ_b ⊙ (B (λ_d ⊙ (A x))); the blocks are λ_d `[1, rank]` and λ_b `[1, out]`."""

    shared: SharedMatrices  # A [rank, widest in], Bᵀ [rank, widest out]

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        inner, outer = blocks  # [groups, 1, rank], [groups, 1, out]
        down, up = self.shared.matrices
        hidden = inputs @ down[:, : inputs.shape[-1]].t()
        outputs.addcmul_((hidden * inner) @ up[:, : outputs.shape[-1]], outer)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=("bias", "modules_to_save"))
    rank = checkpoint.integer("r")
    names = targeted_sites(checkpoint, base)
    vectors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        key = f"{KEY_PREFIX}{name}.vera_lambda"
        inner = checkpoint.take(f"{key}_d", (rank,))
        vectors[name] = inner[None], checkpoint.take(f"{key}_b", (base.sites[name].outputs,))[None]
    inputs, outputs = (max(getattr(base.sites[name], side) for name in names) for side in ("inputs", "outputs"))
    checkpoint.expand("r", rank * (inputs + outputs))
    down, up = _projections(checkpoint, rank, inputs, outputs)
    checkpoint.close()
    device = base.weight(names[0]).device
    kind = Projected(shared_matrices(down.to(base.dtype), up.t().to(base.dtype), device=device))
    return Adapter(
        method=NAME,
        deltas={name: RowDelta(kind, blocks) for name, blocks in vectors.items()},
        parameters=checkpoint.parameters,
        rank=rank,
        warnings=tuple(checkpoint.warnings),
    )


def _projections(checkpoint: Checkpoint, rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A `[rank, inputs]` and B `[outputs, rank]`."""
    if checkpoint.config.get("save_projection", True):
        down = checkpoint.take("base_model.vera_A", (rank, inputs))
        return down, checkpoint.take("base_model.vera_B", (outputs, rank))
    key = checkpoint.config.get("projection_prng_key", 0)
    if not isinstance(key, int) or isinstance(key, bool) or not -_KEYS // 2 <= key < _KEYS:
        message = f"projection_prng_key is {key!r}; it must be a whole number of 64 bits"
        raise AdapterError("bad_config", message, "projection_prng_key")
    if rank > _LARGEST_DRAWN_RANK:
        message = f"r is {rank}; matrices of a rank above {_LARGEST_DRAWN_RANK} must be saved (save_projection)"
        raise AdapterError("unsupported_method", message, "save_projection")
    checkpoint.warnings.append(
        "save_projection: the matrices are not in the checkpoint and were drawn from projection_prng_key; PEFT does "
        "not promise that they are the same with every version of torch"
    )
    generator = torch.Generator().manual_seed(key)
    down = _drawn(rank, inputs, generator)  # A is drawn first
    return down, _drawn(outputs, rank, generator)


def _drawn(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """He's uniform initialisation (He et al., "Delving Deep into Rectifiers", 2015) of a matrix, as PEFT draws it."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
