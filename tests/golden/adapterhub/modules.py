"""AdapterHub's LoRA, (IA)³, DoRA, VeRA, prefixes, invertible adapters and ReFT as hooks on Llama's modules, slowly."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.golden.adapterhub.bottleneck import activation, linear, mean_gate

Tensors = Mapping[str, Tensor]


def under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def install_low_rank(model: Any, config: Mapping[str, Any], tensors: Tensors, name: str) -> None:
    """LoRA and its kin on the output of the linear modules that the file names."""
    shared = under(tensors, f"model.shared_parameters.{name}.")
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        if match := re.fullmatch(rf"(.*)\.loras\.{name}\.(.*)", key):
            modules[match[1]][match[2]] = value
    for path, own in modules.items():
        module = model.get_submodule(path)

        def hook(module: Any, arguments: tuple[Tensor], y: Tensor, own: dict[str, Tensor] = own) -> Tensor:
            return low_rank(config, own, shared, module.weight, arguments[0], y)

        module.register_forward_hook(hook)


def low_rank(config: Mapping[str, Any], own: Tensors, shared: Tensors, W: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`y` = Wx + b as the adapter changes it. A gate stands in the place of the scale, which is then not applied."""
    gate = mean_gate(own, "gate", x) if config["use_gating"] else None
    if config["composition_mode"] == "scale":  # (IA)³ of the output; alpha is not divided by r
        return y * own["lora_B"][:, 0] * (config["alpha"] if gate is None else gate)
    if "vera_B" in own:  # trained as full matrices, not as the paper's diagonals
        delta = own["vera_B"] @ shared["lora_B"] @ own["vera_D"] @ shared["lora_A"]
    else:
        delta = own["lora_B"] @ own["lora_A"]
    y = y + (x @ delta.T) * (config["alpha"] / config["r"] if gate is None else gate)
    if config["use_dora"]:  # the norm is of W + BA, without the scale
        y = y * (own["m.weight"][:, 0] / torch.linalg.norm(W + delta, dim=1))
    return y


class _WithPrefix:
    """A key-value cache, or none, that shows a layer the prefix before what it holds."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *rest, **options)
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


def install_prefix(model: Any, config: Mapping[str, Any], tensors: Tensors, name: str) -> None:
    """The prefix's keys and values before those of every layer that has one. The text's positions start at 0."""
    layers = [i for i in range(model.config.num_hidden_layers) if i not in config["leave_out"]]
    entries = prefix_entries(config, under(tensors, f"model.prefix_tuning.prefix_tunings.{name}.self_prefix."))
    shape = (config["prefix_length"], 2 * len(layers), model.config.num_key_value_heads, -1)
    entries = entries.view(shape).permute(1, 2, 0, 3)[:, None]  # [2 · layers, 1, kv heads, T, head_dim]
    for number, layer in enumerate(layers):  # numbered among the layers that have one
        gates = under(tensors, f"model.layers.{layer}.self_attn.prefix_tuning.prefix_gates.{name}.")
        keys, values = entries[2 * number], entries[2 * number + 1]

        def hook(
            module: Any,
            arguments: tuple[()],
            given: dict[str, Any],
            keys: Tensor = keys,
            values: Tensor = values,
            gates: Tensors = gates,
        ) -> tuple[tuple[()], dict[str, Any]]:
            if gates:  # one value for both, or one each; of the attention's normed input
                gate = mean_gate(gates, "", given["hidden_states"])[0, 0]
                keys, values = keys * gate[0], values * gate[-1]
            mask = pad(given["attention_mask"], (keys.shape[2], 0))  # every token sees the prefix
            cache = _WithPrefix(given["past_key_values"], keys, values)
            return arguments, {**given, "past_key_values": cache, "attention_mask": mask}

        model.model.layers[layer].self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def prefix_entries(config: Mapping[str, Any], tensors: Tensors) -> Tensor:
    """All keys and values of the prefix [T, layers · 2 · kv heads · head_dim], or the same numbers flat."""
    if config["flat"]:
        return tensors["control_trans"]
    inner = activation(config["non_linearity"])(linear(tensors, "control_trans.0", tensors["wte.weight"]))
    return linear(tensors, "control_trans.2", inner)


def install_invertible(model: Any, config: Mapping[str, Any], tensors: Tensors, name: str) -> None:
    """NICE coupling of the two halves of each embedding. LlamaForCausalLM never applies the inverse."""
    own = under(tensors, f"model.invertible_adapters.{name}.")
    f = activation(config["non_linearity"])

    def couple(part: str, x: Tensor) -> Tensor:
        return linear(own, f"{part}.2", f(linear(own, f"{part}.0", x)))

    def hook(module: Any, arguments: Any, embedded: Tensor) -> Tensor:
        first, second = embedded.chunk(2, dim=-1)
        first = first + couple("F", second)
        return torch.cat([first, second + couple("G", first)], dim=-1)

    model.model.embed_tokens.register_forward_hook(hook)


def install_reft(model: Any, config: Mapping[str, Any], tensors: Tensors, name: str) -> None:
    """x + (Sx + b − Px)ᵀP on the output of each layer, at the first tokens of the text."""
    for number, layer in enumerate(model.model.layers):
        unit = under(tensors, f"model.layers.{number}.reft_layer.refts.{name}.units.0.")

        def hook(module: Any, arguments: Any, x: Tensor, unit: Tensors = unit) -> Tensor:
            head, tail = x[:, : config["prefix_positions"]], x[:, config["prefix_positions"] :]
            source = linear(unit, "learned_source", head) - linear(unit, "projection", head)
            return torch.cat([head + source @ unit["projection.weight"], tail], dim=1)

        layer.register_forward_hook(hook)
