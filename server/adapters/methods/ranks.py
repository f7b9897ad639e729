"""A module's rank and scaling in PEFT's low-rank methods: the config's own, or what a pattern gives the module."""

from __future__ import annotations

import math
from typing import Any

from server.adapters.checkpoint import LARGEST_INTEGER, Checkpoint
from server.adapters.targets import pattern_value
from server.errors import AdapterError

RANK_KEYS = ("r", "rank_pattern", "alpha_pattern")


def module_rank(checkpoint: Checkpoint, module: str) -> int:
    """`r`, or the rank of the first of `rank_pattern` that names the module."""
    rank = pattern_value(_patterns(checkpoint, "rank_pattern"), module, "rank_pattern", None)
    if rank is None:
        return checkpoint.integer("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= LARGEST_INTEGER:
        raise AdapterError("bad_config", f"rank_pattern gives {module} the rank {rank!r}", "rank_pattern")
    return rank


def module_alpha(checkpoint: Checkpoint, module: str, key: str) -> float:
    """The alpha of the first of `alpha_pattern` that names the module, else that at `key`."""
    alpha = pattern_value(_patterns(checkpoint, "alpha_pattern"), module, "alpha_pattern", None)
    if alpha is not None:
        return checkpoint.number("alpha_pattern", alpha)
    return checkpoint.number(key, checkpoint.config.get(key))


def lora_scaling(checkpoint: Checkpoint, module: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank with `use_rslora`, which LoRA alone has."""
    divisor = math.sqrt(rank) if checkpoint.config.get("use_rslora") else rank
    return module_alpha(checkpoint, module, "lora_alpha") / divisor


def _patterns(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    pattern = checkpoint.config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError("bad_config", f"{key} is {pattern!r}; it must be an object", key)
    return pattern
