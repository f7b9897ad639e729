"""AdaLoRA: low-rank updates as a singular value decomposition, each module with the rank that training left it.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
Checkpoint (PEFT `ADALORA`): per targeted module `lora_A` `[rank, in]`, `lora_E` `[rank, 1]`, `lora_B` `[out, rank]`:
y = Wx + b + s B (E ⊙ A) x with s = alpha / (init_r + 10⁻⁵), whatever rank is left: PEFT divides by the rank that the
module began with. `rank_pattern` says of each module which of its `init_r` directions are left, possibly none.
"""

from __future__ import annotations

from typing import Any

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import in_turn, low_rank, shift
from server.adapters.method import Adapter, MethodFacts
from server.adapters.methods.biases import take_biases
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, RowDelta

NAME = "adalora"
PEFT_TYPE = "ADALORA"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: low rank",
    formats=("PEFT ADALORA",),
    parameters="r·(in + out + 1) for each targeted module, r its own",
    cost="two thin matrix products at each targeted module",
)

_USED = (
    "init_r",
    "lora_alpha",
    "rank_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "bias",
)
_TRAINING_ONLY = (
    "target_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
    "lora_dropout",
    "fan_in_fan_out",  # how the base stores W
    "init_lora_weights",
    "runtime_config",
    # Of LoRA's config, on which this one is built; PEFT reads none of them here.
    "r",
    "use_rslora",
    "alpha_pattern",
    "lora_bias",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
)
_UNSUPPORTED = (
    "modules_to_save",
    "use_dora",
    "loftq_config",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
_EPSILON = 1e-5  # PEFT's, beside the rank


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=_UNSUPPORTED)
    sites = targeted_sites(checkpoint, base)
    ranks = _ranks(checkpoint, sites)
    updates = {name: _update(checkpoint, base, name, rank) for name, rank in ranks.items()}
    deltas = {name: update for name, update in updates.items() if ranks[name]}
    for name, change in take_biases(checkpoint, base, sites).items():
        deltas[name] = in_turn(deltas[name], shift(change)) if name in deltas else shift(change)
    checkpoint.close()
    return Adapter(
        method=NAME,
        deltas=deltas,
        parameters=checkpoint.parameters,
        rank=max(ranks.values()),
        warnings=tuple(checkpoint.warnings),
    )


def _update(checkpoint: Checkpoint, base: BaseShape, name: str, rank: int) -> RowDelta:
    site, key = base.sites[name], f"{KEY_PREFIX}{name}"
    down = checkpoint.take(f"{key}.lora_A", (rank, site.inputs))
    values = checkpoint.take(f"{key}.lora_E", (rank, 1))
    up = checkpoint.take(f"{key}.lora_B", (site.outputs, rank))
    scaled = checkpoint.finite(f"{key}.lora_E", values * _scaling(checkpoint))
    return low_rank(down, checkpoint.finite(f"{key}.lora_B", up * scaled.t()).t())


def _scaling(checkpoint: Checkpoint) -> float:
    alpha = checkpoint.number("lora_alpha", checkpoint.config.get("lora_alpha"))
    if alpha <= 0:
        raise AdapterError("bad_config", f"lora_alpha is {alpha}; it must be positive", "lora_alpha")
    return alpha / (checkpoint.integer("init_r") + _EPSILON)


def _ranks(checkpoint: Checkpoint, sites: list[str]) -> dict[str, int]:
    """Each targeted site's rank."""
    initial = checkpoint.integer("init_r")
    pattern = checkpoint.config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterError("bad_config", f"rank_pattern is {pattern!r}; it must be an object", "rank_pattern")
    ranks = dict.fromkeys(sites, initial)
    for key, left in pattern.items():
        name = key.rpartition(".lora_")[0]  # the key names the module's `lora_E`
        if name not in ranks:
            raise AdapterError("base_mismatch", f"rank_pattern names {key}, which is not targeted", "rank_pattern")
        ranks[name] = _count(key, left, initial)
    return ranks


def _count(key: str, left: Any, initial: int) -> int:
    if not isinstance(left, list) or len(left) != initial or not all(isinstance(item, bool) for item in left):
        message = f"rank_pattern must give {key} a list of {initial} booleans, one for each of init_r"
        raise AdapterError("bad_config", message, "rank_pattern")
    return sum(left)
