"""SHiRA: a sparse update of weights, at places drawn before training.

Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024. Checkpoint (PEFT `SHIRA`): per targeted module
`shira_indices` `[2, n]` (rows; columns), whole numbers, and `shira_weight` `[n]`, n = r · (in + out):
y = Wx + b + ΔW x. Served as `sparse` is.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.methods.sparse import sparse_update
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, RowDelta, SiteShape

NAME = "shira"
PEFT_TYPE = "SHIRA"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: sparse update of a weight",
    formats=("PEFT SHIRA",),
    parameters="r·(in + out) for each targeted module, at most a tenth of its weight; resident with two indices each",
    cost="a gathered multiplication and a scattered addition of the changed values, for each token",
)
_LARGEST_DENSITY = 0.1  # beyond, the update as a whole would be read faster


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(
        used=("r", "target_modules"),
        training_only=("mask_type", "random_seed", "init_weights"),
        unsupported=("fan_in_fan_out", "modules_to_save"),
    )
    deltas = {
        name: _delta(checkpoint, name, base.sites[name], base.embedding_width)
        for name in targeted_sites(checkpoint, base)
    }
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _delta(checkpoint: Checkpoint, name: str, site: SiteShape, width: int) -> RowDelta:
    key = f"{KEY_PREFIX}{name}.shira_"
    indices = checkpoint.take_indices(f"{key}indices").long()
    if indices.dim() != 2 or len(indices) != 2 or not indices.numel():
        message = f"tensor {key}indices is {list(indices.shape)}; it must be [2, n]"
        raise AdapterError("base_mismatch", message, f"{key}indices")
    rows, columns = indices
    if int(indices.min()) < 0 or int(rows.max()) >= site.outputs or int(columns.max()) >= site.inputs:
        message = f"tensor {key}indices has places outside of the weight [{site.outputs}, {site.inputs}]"
        raise AdapterError("base_mismatch", message, f"{key}indices")
    if len(rows) > _LARGEST_DENSITY * site.inputs * site.outputs:
        message = f"{key}indices names {len(rows)} places of {site.inputs * site.outputs}; at most a tenth is served"
        raise AdapterError("too_large", message, f"{key}indices")
    return sparse_update(rows, columns, checkpoint.take(f"{key}weight", (len(rows),)), width)
