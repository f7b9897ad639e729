"""A module's rank and scaling in PEFT's low-rank methods: the config's own, or what a pattern gives the module."""

from __future__ import annotations

import math
from typing import Any

from server.adapters.checkpoint import Checkpoint
from server.adapters.targets import pattern_value
from server.errors import AdapterError

RANK_KEYS = ("r", "rank_pattern", "alpha_pattern")


def module_rank(checkpoint: Checkpoint, module: str) -> int:
    """`r`, or the rank of the first of `rank_pattern` that names the module."""
    rank = pattern_value(_patterns(checkpoint, "rank_pattern"), module, "rank_pattern", None)
    if rank is None:
        return checkpoint.integer("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError("bad_config", f"rank_pattern gives {module} the rank {rank!r}", "rank_pattern")
    return rank


def module_scaling(checkpoint: Checkpoint, module: str, rank: int, alpha_key: str) -> float:
    """alpha / rank, or alpha / √rank with `use_rslora`; alpha is at `alpha_key`, or what `alpha_pattern` gives."""
    alpha = pattern_value(_patterns(checkpoint, "alpha_pattern"), module, "alpha_pattern", None)
    divisor = math.sqrt(rank) if checkpoint.config.get("use_rslora") else rank
    if alpha is not None:
        return checkpoint.number("alpha_pattern", alpha) / divisor
    return checkpoint.number(alpha_key, checkpoint.config.get(alpha_key)) / divisor


def _patterns(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    pattern = checkpoint.config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError("bad_config", f"{key} is {pattern!r}; it must be an object", key)
    return pattern
