"""Top layers: weights of some modules, usually all of the last layers, tuned in full while the rest is frozen.

Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018; Lee et al., "What Would Elsa
Do? Freezing Layers During Transformer Fine-Tuning", 2019 (arXiv 1911.03090). Checkpoint (Medley's own): a config
`{"medley_method": "top_layers"}` and tensors named and shaped as the base's own, `<module>.weight` and `<module>.bias`
of linear modules and norms, which replace these. Kept as differences: y ← y + (W' - W) x + (b' - b), of a norm
y ← y + (w' - w) ⊙ n(x) + (b' - b). What equals the base's own is not kept. The output layer is a module like any
other: where its weight is also the input embedding's, that one stays the base's.

This is the most expensive of all methods: an adapter is as large as the weights that it changes, and a step reads them
once for each task that it has. The bank's size bounds it: an adapter that does not fit is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import in_turn, norm_scale, shift
from server.adapters.method import Adapter, MethodFacts
from server.errors import AdapterError
from server.model import BaseShape, DeltaKind, RowDelta, SiteKind, SiteShape

NAME = "top_layers"
MEDLEY_METHOD = "top_layers"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: whole weights",
    formats=("Medley top_layers",),
    parameters="all of each weight that is given",
    cost="one more product with each weight, read for each task of a step: as slow as the task run alone, and as large",
)


@dataclass(frozen=True)
class Dense(DeltaKind):
    """y ← y + ΔW x."""

    by_adapter = True

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        (change,) = blocks  # [groups, out, in]
        outputs.baddbmm_(inputs, change.transpose(1, 2))


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=(), training_only=(), unsupported=("modules_to_save",))
    deltas: dict[str, RowDelta] = {}
    for name, site in base.sites.items():
        if site.kind in (SiteKind.LINEAR, SiteKind.NORM) and (parts := _parts(checkpoint, base, name, site)):
            deltas[name] = in_turn(*parts)
    checkpoint.close()
    if not deltas:
        raise AdapterError("base_mismatch", "the adapter's tensors are the base's own, so it would change nothing")
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _parts(checkpoint: Checkpoint, base: BaseShape, name: str, site: SiteShape) -> list[RowDelta]:
    """Take what is there of a module."""
    left, parts = set(checkpoint.names), []
    if f"{name}.weight" in left:
        change = _weight_change(checkpoint, base, name, site)
        if change.any():
            parts.append(RowDelta(Dense(), (change,)) if site.norm is None else norm_scale(change, site.norm))
    if f"{name}.bias" in left:
        bias, own = checkpoint.take(f"{name}.bias", (site.outputs,)), base.bias(name)
        change = bias if own is None else checkpoint.finite(f"{name}.bias", bias - own.cpu())
        if change.any():
            parts.append(shift(change))
    return parts


def _weight_change(checkpoint: Checkpoint, base: BaseShape, name: str, site: SiteShape) -> Tensor:
    """W' - W, `[out, in]`, or a norm's w' - w `[width]`."""
    key, own = f"{name}.weight", base.weight(name).cpu()
    if site.norm is not None:
        return checkpoint.finite(key, checkpoint.take(key, (site.outputs,)) - own)
    if site.is_transposed:
        return checkpoint.finite(key, checkpoint.take(key, (site.inputs, site.outputs)).t() - own)
    return checkpoint.finite(key, checkpoint.take(key, (site.outputs, site.inputs)) - own)
