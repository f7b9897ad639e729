"""(IA)³: trained vectors that rescale activations.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
2022. Checkpoint (PEFT `IA3`): per targeted module `ia3_l`, `[out, 1]` for its output, y = l ⊙ (Wx + b), the bias
scaled too, or `[1, in]` for its input, y = W(l ⊙ x) + b, where `feedforward_modules` names it.
"""

from __future__ import annotations

from typing import Any

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import input_scale, output_scale
from server.adapters.method import Adapter, MethodFacts
from server.adapters.targets import KEY_PREFIX, names_module, strings, targeted_sites
from server.model import BaseShape, RowDelta

NAME = "ia3"
PEFT_TYPE = "IA3"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: scale",
    formats=("PEFT IA3", "AdapterHub lora, composition_mode scale"),
    parameters="out for each targeted module, in for those of feedforward_modules",
    cost="one multiplication at each targeted module",
)

_USED = ("target_modules", "exclude_modules", "feedforward_modules")
_TRAINING_ONLY = ("init_ia3_weights", "fan_in_fan_out")  # the latter says how the base stores W


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=("modules_to_save",))
    feedforward = checkpoint.config.get("feedforward_modules") or []
    deltas: dict[str, RowDelta] = {}
    for name in targeted_sites(checkpoint, base):
        site, key = base.sites[name], f"{KEY_PREFIX}{name}.ia3_l"
        if _scales_input(feedforward, name):
            deltas[name] = input_scale(checkpoint.take(key, (1, site.inputs)).flatten())
        else:
            deltas[name] = output_scale(checkpoint.take(key, (site.outputs, 1)).flatten())
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _scales_input(feedforward: Any, module: str) -> bool:
    """PEFT's rule for `feedforward_modules`: a regular expression for the whole name, or a list of endings."""
    if isinstance(feedforward, str):
        return names_module(feedforward, module, "feedforward_modules")
    return module.endswith(tuple(strings(feedforward, "feedforward_modules")))
