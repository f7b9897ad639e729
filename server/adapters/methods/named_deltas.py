"""Named deltas: what was added to biases and norms, by their names; BitFit, norm tuning and AdapterBias.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL
2022; Fu et al., "AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP Tasks",
Findings of NAACL 2022.

Checkpoint (Medley's own): a config `{"medley_method": "named_deltas"}` and tensors named by the modules of the base,
each what is *added* to the base's own (trained less base), any of:

| tensor | shape | adds |
|---|---|---|
| `<module>.bias` | `[out]` | to the output of a linear module or a norm, also where the base has no bias there |
| `<norm>.weight` | `[width]` | to a norm's weight: y ← y + Δw ⊙ n(x) |
| `<module>.adapter_bias.vector` v | `[out]` | with the next two: y ← y + (a · x + c) v for each token |
| `<module>.adapter_bias.alpha.weight` a | `[1, in]` | |
| `<module>.adapter_bias.alpha.bias` c | `[1]` | may be left out |

AdapterBias has its place at the second linear module of each feed-forward network, and its α is a linear layer of that
module's input x, as in the authors' code (github.com/Allen0307/AdapterBias, `BertOutput` of
`src/transformers/models/bert/modeling_bert.py`). Where a module has several, they
apply in the order of the table, a norm's weight before its bias.
"""

from __future__ import annotations

import torch

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import in_turn, norm_scale, shift, token_shift
from server.adapters.method import Adapter, MethodFacts
from server.errors import AdapterError
from server.model import BaseShape, RowDelta, SiteKind, SiteShape

NAME = "named_deltas"
MEDLEY_METHOD = "named_deltas"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: bias, norm, token-dependent shift",
    formats=("Medley named_deltas (BitFit, norm tuning, AdapterBias)",),
    parameters="out for each bias, width for each norm's weight, in + out + 1 for each token-dependent shift",
    cost="one addition at each bias, a normalisation at each norm's weight, a dot product at each token's shift",
)

_BIAS, _WEIGHT = ".bias", ".weight"
_VECTOR, _ALPHA = ".adapter_bias.vector", ".adapter_bias.alpha"


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=("medley_method",), training_only=(), unsupported=("modules_to_save",))
    parts: dict[str, list[RowDelta]] = {}
    for name, site in base.sites.items():
        if found := _parts(checkpoint, name, site):
            parts[name] = found
    checkpoint.close()
    if not parts:
        raise AdapterError("base_mismatch", "the adapter has no tensor, so it would change nothing")
    deltas = {name: in_turn(*found) for name, found in parts.items()}
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _parts(checkpoint: Checkpoint, name: str, site: SiteShape) -> list[RowDelta]:
    """Take what is there of a module."""
    left, width, parts = set(checkpoint.names), site.outputs, []
    if site.kind not in (SiteKind.LINEAR, SiteKind.NORM):
        return []
    if site.norm is not None and f"{name}{_WEIGHT}" in left:
        parts.append(norm_scale(checkpoint.take(f"{name}{_WEIGHT}", (width,)), site.norm))
    if f"{name}{_BIAS}" in left:
        parts.append(shift(checkpoint.take(f"{name}{_BIAS}", (width,))))
    if f"{name}{_VECTOR}" in left:
        vector = checkpoint.take(f"{name}{_VECTOR}", (width,))
        weight = checkpoint.take(f"{name}{_ALPHA}{_WEIGHT}", (1, site.inputs))[0]
        constant = torch.zeros(1, dtype=weight.dtype)
        if f"{name}{_ALPHA}{_BIAS}" in left:
            constant = checkpoint.take(f"{name}{_ALPHA}{_BIAS}", (1,))
        parts.append(token_shift(vector, weight, constant))
    return parts
