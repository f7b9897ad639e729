"""What `stacked` does to modules: changes of what enters or leaves them, one around the other; and PEFT's merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.hra.layer import HRALinear
from peft.tuners.road.layer import Linear as RoadLinear
from peft.tuners.road.layer import _get_delta_weight as road_matrix
from torch import Tensor, nn
from transformers import PreTrainedModel

Place = Callable[[Tensor, Tensor], Tensor]
"""From a sub-block's output h and the stream r before it to the stream behind it."""


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Mₖ(x) = Mₖ₋₁(change(x))."""
    inner = module.forward
    module.forward = lambda x: inner(change(x))


def change_output(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Mₖ(x) = change(x, Mₖ₋₁(x))."""
    inner = module.forward
    module.forward = lambda x: change(x, inner(x))


def add_difference(module: nn.Module, changed: nn.Module, own: nn.Module) -> None:
    """Mₖ(x) = Mₖ₋₁(x) + changed(x) - own(x)."""
    change_output(module, lambda x, y: y + changed(x) - own(x))


def run_block(layer: Any, after_attention: list[Place], after_mlp: list[Place], x: Tensor, **options: Any) -> Tensor:
    """A decoder layer. Each adapter makes another h of h, the output of the sub-block: the stream is h + r."""
    h, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **options)
    for place in after_attention:
        h = place(h, x) - x
    r = h + x
    h = layer.mlp(layer.post_attention_layernorm(r))
    for place in after_mlp:
        h = place(h, r) - r
    behind: Tensor = h + r
    return behind


@lru_cache(maxsize=64)
def merged(base: PreTrainedModel, folder: Path) -> nn.Module:
    """The base with an adapter's change in its own parameters, by the library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's, about these tiny bases and its sparse tensors
        model: nn.Module = PeftModel.from_pretrained(deepcopy(base), folder).merge_and_unload()
    return model


def rotations(base: PreTrainedModel, folder: Path) -> Iterator[tuple[str, bool, Tensor]]:
    """Modules that HRA or RoAd turns: name, whether its input is turned or its output, and the library's matrix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's, about these tiny bases
        model: Any = PeftModel.from_pretrained(deepcopy(base), folder)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, HRALinear):
            yield name, True, layer.get_delta_weight("default")
        elif isinstance(layer, RoadLinear):
            given = (part["default"] for part in (layer.variant, layer.group_size, layer.road_theta, layer.road_alpha))
            yield name, False, road_matrix(*given)
