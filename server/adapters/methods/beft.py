"""BEFT: a trained vector added to the outputs of modules, by default those of the values' projections.

Huang et al., "BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes", arXiv:2509.15974. Checkpoint
(PEFT `BEFT`): per targeted module `beft_bias` `[1, out]`: y + b.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import shift
from server.adapters.method import Adapter, MethodFacts
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.model import BaseShape

NAME = "beft"
PEFT_TYPE = "BEFT"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: bias",
    formats=("PEFT BEFT",),
    parameters="out for each targeted module",
    cost="one addition at each targeted module",
)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=("target_modules",), training_only=("init_weights",), unsupported=("modules_to_save",))
    deltas = {
        name: shift(checkpoint.take(f"{KEY_PREFIX}{name}.beft_bias", (1, base.sites[name].outputs))[0])
        for name in targeted_sites(checkpoint, base)
    }
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))
