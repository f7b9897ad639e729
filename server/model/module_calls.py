"""What is passed to a base's modules in a forward pass, and what they give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModuleCall:
    """A module's call."""

    module: nn.Module
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    output: Any


@contextmanager
def recorded_calls(modules: Iterable[nn.Module]) -> Iterator[list[ModuleCall]]:
    """Every call of one of these inside the block, in the order in which they end."""
    calls: list[ModuleCall] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.append(ModuleCall(module, arguments, named, output))

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
