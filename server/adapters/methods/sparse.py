"""Diff pruning: a sparse change of weights.

Guo et al., "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021. Checkpoint (Medley's own): a config
`{"medley_method": "sparse"}` and for each changed weight of a linear module, named as in the base (`<module>.weight`):
`<module>.weight.indices`, int32 or int64, `[2, n]` (rows; columns) or `[n]` (row · columns + column) into the weight as
the base stores it, and `<module>.weight.values` `[n]`, what is added there; at most 1 % of the weight. Values of one
place add up. y ← y + ΔW x.

Indices are kept among the adapter's rows, as 32-bit patterns in the pool's dtype, so that an entry costs 12 bytes in
float32 and 10 in a 16-bit type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.errors import AdapterError
from server.model import BaseShape, DeltaKind, RowDelta, SiteKind, SiteShape

NAME = "sparse"
MEDLEY_METHOD = "sparse"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: sparse update of a weight",
    formats=("Medley sparse",),
    parameters="one for each changed value, at most 1 % of each weight; resident with two indices each",
    cost="a gathered multiplication and a scattered addition of the changed values, for each token",
)

_LARGEST_DENSITY = 0.01
_VALUES_AT_ONCE = 2**22  # of products, so that a long prompt takes no more memory than this
_INDICES, _VALUES = ".weight.indices", ".weight.values"


@dataclass(frozen=True)
class _Sparse(DeltaKind):
    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        rows, columns = (block.flatten(1).view(torch.int32).long()[:, None] for block in blocks[:2])  # [groups, 1, n]
        values = blocks[2].flatten(1)[:, None]
        step = max(1, _VALUES_AT_ONCE // values.numel())
        for start in range(0, inputs.shape[1], step):
            given, changed = inputs[:, start : start + step], outputs[:, start : start + step]
            shape = (-1, given.shape[1], -1)
            changed.scatter_add_(2, rows.expand(shape), given.gather(2, columns.expand(shape)) * values)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=(), training_only=(), unsupported=("modules_to_save",))
    changed = [name.removesuffix(_INDICES) for name in checkpoint.names if name.endswith(_INDICES)]
    deltas = {
        name: _delta(checkpoint, name, base.sites[name], base.embedding_width)
        for name in changed
        if name in base.sites and base.sites[name].kind is SiteKind.LINEAR
    }
    checkpoint.close()
    if not deltas:
        raise AdapterError("base_mismatch", "the adapter has no tensor, so it would change nothing")
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _delta(checkpoint: Checkpoint, name: str, site: SiteShape, width: int) -> RowDelta:
    """A weight's change, its rows `width` wide, filled up by zeros added at the place 0, 0."""
    rows, columns = _places(checkpoint, name, site)
    if len(rows) > _LARGEST_DENSITY * site.inputs * site.outputs:
        message = (
            f"{name}{_INDICES} names {len(rows)} places of {site.inputs * site.outputs}; at most 1 % can be changed"
        )
        raise AdapterError("too_large", message, f"{name}{_INDICES}")
    values = checkpoint.take(f"{name}{_VALUES}", (len(rows),))
    return (
        sparse_update(columns, rows, values, width)
        if site.is_transposed
        else sparse_update(rows, columns, values, width)
    )


def sparse_update(rows: Tensor, columns: Tensor, values: Tensor, width: int) -> RowDelta:
    """y ← y + ΔW x, where ΔW `[out, in]` has these `values` `[n]` at `rows` and `columns`; kept `width` wide."""
    if width * values.dtype.itemsize % 4:
        raise AdapterError("base_mismatch", f"the base's width {width} is odd, so it cannot keep indices in its dtype")
    filling = (0, -len(rows) % width)
    rows, columns, values = (functional.pad(part, filling) for part in (rows, columns, values))
    patterns = (part.to(torch.int32).view(values.dtype).view(-1, width) for part in (rows, columns))
    return RowDelta(_Sparse(), (*patterns, values.view(-1, width)))


def _places(checkpoint: Checkpoint, name: str, site: SiteShape) -> tuple[Tensor, Tensor]:
    """Rows and columns of the changed values, in the weight as the base stores it."""
    key = f"{name}{_INDICES}"
    height, width = (site.inputs, site.outputs) if site.is_transposed else (site.outputs, site.inputs)
    indices = checkpoint.take_indices(key).long()
    if indices.dim() == 1:
        indices = torch.stack([indices // width, indices % width])
    if indices.dim() != 2 or len(indices) != 2 or not indices.numel():
        raise AdapterError("base_mismatch", f"tensor {key} is {list(indices.shape)}; it must be [2, n] or [n]", key)
    rows, columns = indices
    if int(indices.min()) < 0 or int(rows.max()) >= height or int(columns.max()) >= width:
        raise AdapterError("base_mismatch", f"tensor {key} has places outside of the weight [{height}, {width}]", key)
    return rows, columns
