"""MiSS: low-rank updates whose first matrix is not trained but sums the input's shards.

Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", 2024.
Checkpoint (PEFT `MISS`): per targeted module `miss_block` M `[rank, out]`: y = Wx + b + Mᵀ z, where z has `rank`
values, z_j the sum of all x_i with i = j modulo `rank`. With `init_weights = "mini"` M is `[rank, mini_r]`, repeated
along the output. With "bat" the update depends on W itself and has no such form: refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, DeltaKind, RowDelta

NAME = "miss"
PEFT_TYPE = "MISS"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: low rank of summed shards",
    formats=("PEFT MISS",),
    parameters="r·out for each targeted module, r·mini_r if init_weights is mini",
    cost="one thin matrix product at each targeted module",
)

_USED = ("r", "mini_r", "init_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class SummedShards(DeltaKind):
    """y ← y + Mᵀ z, z_j = Σ x_i over i = j modulo rank; the block is M `[rank, out]`."""

    rank: int

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        """See `DeltaKind`."""
        (block,) = blocks
        shards = pad(inputs, (0, -inputs.shape[-1] % self.rank)).reshape(*inputs.shape[:-1], -1, self.rank)
        outputs.baddbmm_(shards.sum(-2), block)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=("miss_dropout",), unsupported=("bias", "modules_to_save"))
    rank, form = checkpoint.integer("r"), checkpoint.config.get("init_weights", True)
    if form not in (True, False, "mini"):
        message = f"init_weights = {form!r} makes the update depend on the base's weights and is not supported"
        raise AdapterError("unsupported_method", message, "init_weights")
    deltas: dict[str, RowDelta] = {}
    for name in targeted_sites(checkpoint, base):
        key, outputs = f"{KEY_PREFIX}{name}.miss_block", base.sites[name].outputs
        width = checkpoint.integer("mini_r") if form == "mini" else outputs
        if outputs % width:
            message = f"mini_r is {width}, which does not divide the {outputs} outputs of {name}"
            raise AdapterError("base_mismatch", message, "mini_r")
        checkpoint.expand("mini_r", rank * outputs)
        deltas[name] = RowDelta(SummedShards(rank), (checkpoint.take(key, (rank, width)).repeat(1, outputs // width),))
    checkpoint.close()
    return Adapter(
        method=NAME,
        deltas=deltas,
        parameters=checkpoint.parameters,
        rank=rank,
        warnings=tuple(checkpoint.warnings),
    )
