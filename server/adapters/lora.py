"""LoRA: trained low-rank updates of linear modules.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; rsLoRA's scaling: Kalajdzievski 2023.
Checkpoint (PEFT `LORA`): per targeted module `lora_A.weight` `[rank, in]` and `lora_B.weight` `[out, rank]`:
y = Wx + b + s B A x with s = alpha / rank, or alpha / √rank with `use_rslora`. `rank_pattern` and `alpha_pattern`
give a module its own rank and alpha.
"""

from __future__ import annotations

import math
from typing import Any

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import low_rank
from server.adapters.method import Adapter
from server.adapters.targets import KEY_PREFIX, pattern_value, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, RowDelta

NAME = "lora"
PEFT_TYPE = "LORA"

_USED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
)
_TRAINING_ONLY = (
    "lora_dropout",
    "fan_in_fan_out",  # how the base stores W
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",  # of use_qalora
    "runtime_config",
    "ensure_weight_tying",  # of modules_to_save
)
_UNSUPPORTED = (
    "bias",
    "lora_bias",
    "use_dora",
    "modules_to_save",
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
# Initialisations that leave the base's own weights as they are. The others move part of W into A and B, so
# that the adapter is right only over a base that was changed likewise.
_BASE_KEEPING_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=_UNSUPPORTED)
    _check_initialisation(checkpoint.config.get("init_lora_weights"))
    deltas: dict[str, RowDelta] = {}
    largest = 0
    for name in targeted_sites(checkpoint, base):
        site, key = base.sites[name], f"{KEY_PREFIX}{name}"
        rank = _rank(checkpoint, name)
        down = checkpoint.take(f"{key}.lora_A.weight", (rank, site.inputs))
        up = checkpoint.take(f"{key}.lora_B.weight", (site.outputs, rank))
        scaled = checkpoint.finite(f"{key}.lora_B.weight", up * _scaling(checkpoint, name, rank))
        deltas[name] = low_rank(down, scaled.t())
        largest = max(largest, rank)
    _refuse_base_copies(checkpoint)
    checkpoint.close()
    return Adapter(
        method=NAME,
        deltas=deltas,
        parameters=checkpoint.parameters,
        rank=largest,
        warnings=tuple(checkpoint.warnings),
    )


def _check_initialisation(value: Any) -> None:
    if value not in _BASE_KEEPING_INITS:
        raise AdapterError(
            "unsupported_method",
            f"init_lora_weights = {value!r} changes the base's weights; save the adapter converted to plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
            "init_lora_weights",
        )


def _refuse_base_copies(checkpoint: Checkpoint) -> None:
    """PEFT adds the base's own embedding or head to the file of an adapter that targets one."""
    for name in checkpoint.names:
        if ".base_layer." in name:
            raise AdapterError(
                "unsupported_method",
                f"tensor {name} is a copy of the base's own; save the adapter with save_embedding_layers=False",
                name,
            )


def _rank(checkpoint: Checkpoint, module: str) -> int:
    pattern = _patterns(checkpoint, "rank_pattern")
    rank = pattern_value(pattern, module, "rank_pattern", None)
    if rank is None:
        return checkpoint.integer("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError("bad_config", f"rank_pattern gives {module} the rank {rank!r}", "rank_pattern")
    return rank


def _scaling(checkpoint: Checkpoint, module: str, rank: int) -> float:
    pattern = _patterns(checkpoint, "alpha_pattern")
    alpha = pattern_value(pattern, module, "alpha_pattern", None)
    divisor = math.sqrt(rank) if checkpoint.config.get("use_rslora") else rank
    if alpha is not None:
        return checkpoint.number("alpha_pattern", alpha) / divisor
    return checkpoint.number("lora_alpha", checkpoint.config.get("lora_alpha")) / divisor


def _patterns(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    pattern = checkpoint.config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError("bad_config", f"{key} is {pattern!r}; it must be an object", key)
    return pattern
