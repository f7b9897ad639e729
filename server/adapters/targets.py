"""Which modules of the base a PEFT config targets, by PEFT's own rules of matching names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

import regex

from server.adapters.checkpoint import Checkpoint
from server.errors import AdapterError
from server.model import BaseShape, SiteKind, SiteShape

_ALL_LINEAR = "all-linear"
_MATCH_SECONDS = 0.5
_MOST_CHARACTERS, _MOST_REPEATS, _MOST_EXPANDED = 2000, 1000, 20_000  # of an expression; the last: their product
_ORDINARY = 500  # as `_MOST_EXPANDED`; what is larger is seldom an honest one
# What follows each opening brace, up to one more or its end. Under `(?x)` comments and space may stand between digits.
_BRACED = regex.compile(r"\{(?=((?:#[^\n]*\n|[^#{}])*+))")
_IGNORED = regex.compile(r"#[^\n]*\n|\s")
_WORDS = {
    SiteKind.LINEAR: "linear module",
    SiteKind.NORM: "norm",
    SiteKind.ATTENTION: "attention",
    SiteKind.RESULT: "attention's result",
    SiteKind.BLOCK: "block",
    SiteKind.EMBEDDING: "input embedding",
}
KEY_PREFIX = "base_model.model."  # before the module's name in the keys of PEFT's layer methods


def targeted_sites(checkpoint: Checkpoint, base: BaseShape, *kinds: SiteKind) -> list[str]:
    """The sites of these kinds (linear ones unless told) that `target_modules` and the layer and exclusion keys beside
    it select, in the base's order.

    `target_modules` is a regular expression for the whole name, or a list of names that match a module of
    that name or one that ends in `.name`; `all-linear` is every linear module but the output head.
    """
    targets = checkpoint.config.get("target_modules")
    excluded = checkpoint.config.get("exclude_modules")
    kinds = kinds or (SiteKind.LINEAR,)
    sites = [
        name
        for name, site in base.sites.items()
        if site.kind in kinds
        and not names_module(excluded, name, "exclude_modules")
        and (_is_inner_linear(site) if _is_all_linear(targets) else _is_targeted(checkpoint, targets, name))
    ]
    if not sites:
        raise AdapterError(
            "base_mismatch",
            f"target_modules {targets!r} names no {' or '.join(_WORDS[kind] for kind in kinds)} of this base",
            "target_modules",
        )
    return sites


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == _ALL_LINEAR


def _is_inner_linear(site: SiteShape) -> bool:
    return site.kind is SiteKind.LINEAR and not site.is_head


def _is_targeted(checkpoint: Checkpoint, targets: Any, module: str) -> bool:
    """Layer numbers narrow a list's endings down, never an expression or a module's whole name."""
    if not names_module(targets, module, "target_modules"):
        return False
    return isinstance(targets, str) or module in targets or _in_layers(checkpoint, module)


def names_module(rule: Any, module: str, key: str) -> bool:
    """Whether a rule of the config, found at `key`, names a module."""
    if rule is None:
        return False
    if isinstance(rule, str):
        return matched(rf"(?:{rule})\Z", module, key) is not None
    return any(module == name or module.endswith(f".{name}") for name in strings(rule, key))


def strings(value: Any, key: str) -> list[str]:
    """A list of strings of the config."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterError("bad_config", f"{key} is {value!r}; it must be a string or a list of strings", key)
    return value


def matched(pattern: str, module: str, key: str) -> regex.Match[str] | None:
    """The match of a regular expression of the config at the start of a module's name.

    An expression from outside may take for ever; `regex`, unlike `re`, gives up after a while and lets the
    engine's thread go on meanwhile. Compiling it has no such end: one that would take long is refused before.
    """
    expanded = _expanded(pattern, key)
    try:
        compiled = _compiled(pattern) if expanded <= _ORDINARY else _compiled_large(pattern)
        return compiled.match(module, timeout=_MATCH_SECONDS, concurrent=True)
    except (regex.error, RecursionError) as error:
        raise AdapterError("bad_config", f"{key}: {pattern!r} is no regular expression: {error}", key) from error
    except TimeoutError as error:
        message = f"{key}: {pattern!r} takes longer than {_MATCH_SECONDS} s on {module}; write a simpler expression"
        raise AdapterError("bad_config", message, key) from error


def _expanded(pattern: str, key: str) -> int:
    """About how large an expression is once `regex` has written its counted repeats out: its characters times all that
    its braces count. Raises `bad_config` where that is too much."""
    if len(pattern) > _MOST_CHARACTERS:
        message = f"{key} is an expression of {len(pattern)} characters; at most {_MOST_CHARACTERS} are possible"
        raise AdapterError("bad_config", f"{message}; write a list of names instead", key)
    braced = (_IGNORED.sub("", found[1]) for found in _BRACED.finditer(pattern))
    repeats = prod(max([1, *map(int, regex.findall("[0-9]+", text))]) for text in braced)
    if repeats > _MOST_REPEATS or repeats * len(pattern) > _MOST_EXPANDED:
        message = f"{key}: the counted repeats of {pattern!r} make it too large: multiplied they may be {_MOST_REPEATS}"
        message += f", and with its {len(pattern)} characters {_MOST_EXPANDED}; write * or + instead"
        raise AdapterError("bad_config", message, key)
    return repeats * len(pattern)


def _compile(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern, cache_pattern=False)  # the library's cache holds too few, and large ones as long


_compiled = lru_cache(maxsize=1024)(_compile)  # the rank patterns of one large adapter are several hundred
_compiled_large = lru_cache(maxsize=32)(_compile)


def pattern_value(patterns: Mapping[str, Any], module: str, key: str, default: Any) -> Any:
    """The value of the first pattern that names the module's whole name or its end."""
    for pattern, value in patterns.items():
        if matched(rf"(.*\.)?({pattern})$", module, key):
            return value
    return default


def _in_layers(checkpoint: Checkpoint, module: str) -> bool:
    """PEFT's `layers_to_transform`, which goes with a list of targets: the first number in the module's name
    (or the first after one of `layers_pattern`) must be one of those given."""
    layers = checkpoint.config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        message = f"layers_to_transform is {layers!r}; it must be a whole number or a list of them"
        raise AdapterError("bad_config", message, "layers_to_transform")
    patterns = checkpoint.config.get("layers_pattern")
    if patterns:
        names = [patterns] if isinstance(patterns, str) else strings(patterns, "layers_pattern")
        rules = [rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in names]
    else:
        rules = [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    found = (matched(rule, module, "layers_pattern") for rule in rules)
    match = next((candidate for candidate in found if candidate), None)
    return match is not None and int(match["layer"]) in numbers
