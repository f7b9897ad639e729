"""Which modules of the base a PEFT config targets, by PEFT's own rules of matching names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from server.adapters.checkpoint import Checkpoint
from server.errors import AdapterError
from server.model import BaseShape

_ALL_LINEAR = "all-linear"
KEY_PREFIX = "base_model.model."  # before the module's name in the keys of PEFT's layer methods


def targeted_sites(checkpoint: Checkpoint, base: BaseShape) -> list[str]:
    """The sites that `target_modules` (and the layer and exclusion keys beside it) select, in the base's order.

    `target_modules` is a regular expression for the whole name, or a list of names that match a module of
    that name or one that ends in `.name`; `all-linear` is every linear module but the output head.
    """
    targets = checkpoint.config.get("target_modules")
    if targets == _ALL_LINEAR:
        return [name for name, site in base.sites.items() if not site.is_head]
    sites = [
        name
        for name in base.sites
        if names_module(targets, name, "target_modules")
        and not names_module(checkpoint.config.get("exclude_modules"), name, "exclude_modules")
        and (isinstance(targets, str) or _in_layers(checkpoint, name))
    ]
    if not sites:
        raise AdapterError(
            "base_mismatch", f"target_modules {targets!r} names no linear module of this base", "target_modules"
        )
    return sites


def names_module(rule: Any, module: str, key: str) -> bool:
    """Whether a rule of the config, found at `key`, names a module."""
    if rule is None:
        return False
    if isinstance(rule, str):
        return compiled(rule, key).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in strings(rule, key))


def strings(value: Any, key: str) -> list[str]:
    """A list of strings of the config."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterError("bad_config", f"{key} is {value!r}; it must be a string or a list of strings", key)
    return value


def compiled(pattern: str, key: str) -> re.Pattern[str]:
    """A regular expression of the config."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise AdapterError("bad_config", f"{key}: {pattern!r} is no regular expression: {error}", key) from error


def pattern_value(patterns: Mapping[str, Any], module: str, key: str, default: Any) -> Any:
    """The value of the first pattern that names the module's whole name or its end."""
    for pattern, value in patterns.items():
        if compiled(rf"(.*\.)?({pattern})$", key).match(module):
            return value
    return default


def _in_layers(checkpoint: Checkpoint, module: str) -> bool:
    """PEFT's `layers_to_transform`, which goes with a list of targets: the first number in the module's name
    (or the first after one of `layers_pattern`) must be one of those given."""
    layers = checkpoint.config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    numbers: list[int] = [layers] if isinstance(layers, int) else layers
    patterns = checkpoint.config.get("layers_pattern") or [r"[^.]*"]
    names = [patterns] if isinstance(patterns, str) else strings(patterns, "layers_pattern")
    found = (compiled(rf"(?:^|.*?\.){name}\.(\d+)\.", "layers_pattern").match(module) for name in names)
    match = next((candidate for candidate in found if candidate), None)
    return match is not None and int(match.group(1)) in numbers
