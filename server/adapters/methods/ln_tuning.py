"""LayerNorm tuning: the weights and biases of norms, trained.

Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", ICLR 2024. Checkpoint (PEFT
`LN_TUNING`): per targeted norm `ln_tuning_layers.weight` `[width]` and, where the base's norm has one,
`ln_tuning_layers.bias` `[width]`, which replace the base's: y = w' ⊙ n(x) + b'. Kept as differences from the base's:
y ← y + (w' - w) ⊙ n(x) + (b' - b).
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import in_turn, norm_scale, shift
from server.adapters.method import Adapter, MethodFacts
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.model import BaseShape, RowDelta, SiteKind

NAME = "ln_tuning"
PEFT_TYPE = "LN_TUNING"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: norm",
    formats=("PEFT LN_TUNING",),
    parameters="width for each targeted norm, twice that where it has a bias",
    cost="one more normalisation and multiplication at each targeted norm",
)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(
        used=("target_modules", "exclude_modules"), training_only=(), unsupported=("modules_to_save",)
    )
    deltas = {name: _delta(checkpoint, base, name) for name in targeted_sites(checkpoint, base, SiteKind.NORM)}
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _delta(checkpoint: Checkpoint, base: BaseShape, name: str) -> RowDelta:
    site, key = base.sites[name], f"{KEY_PREFIX}{name}.ln_tuning_layers"
    assert site.norm is not None, "a norm has a form"
    weight = checkpoint.take(f"{key}.weight", (site.outputs,)) - base.weight(name).cpu()
    parts = [norm_scale(checkpoint.finite(f"{key}.weight", weight), site.norm)]
    own_bias = base.bias(name)
    if own_bias is not None:
        bias = checkpoint.take(f"{key}.bias", (site.outputs,)) - own_bias.cpu()
        parts.append(shift(checkpoint.finite(f"{key}.bias", bias)))
    return in_turn(*parts)
