"""A stack of adapters, slowly and obviously: one request on the unmodified base, as the order of stacks is defined.

With M₀ a module of the base, the task's adapter makes M₁ of it and the user's makes M₂ of that. A task's virtual tokens
precede its user's, and those that are embeddings run under the whole stack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.harness import NEAR_TIE, Alone

_PREFIX = "base_model.model."


def slow_generate(model: PreTrainedModel, folders: list[Path], prompt: list[int], max_tokens: int) -> Alone:
    """Greedy. Changes `model`: give a new one each time."""
    stack = [(_config(folder), load_file(folder / "adapter_model.safetensors")) for folder in folders]
    for config, tensors in stack:
        _change_modules(model, config, tensors)
    cache = DynamicCache(config=model.config)
    logits = torch.empty(0)
    with torch.inference_mode():
        for config, tensors in stack:
            if config["peft_type"] in ("PROMPT_TUNING", "P_TUNING"):
                logits = _run(model, tensors["prompt_embeddings"][None], cache)
            elif config["peft_type"] == "PREFIX_TUNING":
                _append(model, tensors["prompt_embeddings"], cache)
        embed = model.get_input_embeddings()
        if prompt:
            logits = _run(model, embed(torch.tensor([prompt])), cache)
        tokens, logprobs, near_tie = [], [], None
        for step in range(max_tokens):
            best = logits.topk(2).values
            if near_tie is None and best[0] - best[1] < NEAR_TIE:
                near_tie = step
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
            logits = _run(model, embed(torch.tensor([[tokens[-1]]])), cache)
    return Alone(tokens, logprobs, near_tie)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def _run(model: PreTrainedModel, embeddings: Tensor, cache: DynamicCache) -> Tensor:
    """The last position's logits."""
    at = cache.get_seq_length()
    positions = torch.arange(at, at + embeddings.shape[1])[None]
    output = model(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True)
    logits: Tensor = output.logits[0, -1]
    return logits


def _append(model: PreTrainedModel, flat: Tensor, cache: DynamicCache) -> None:
    layers = model.config.num_hidden_layers
    entries = flat.view(len(flat), 2 * layers, model.config.num_key_value_heads, -1).permute(1, 2, 0, 3)
    for layer in range(layers):
        cache.update(entries[2 * layer][None], entries[2 * layer + 1][None], layer)


def _change_modules(model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        key = f"{_PREFIX}{name}"
        update = _update(config, tensors, key, getattr(module, "in_features", 0))
        if f"{key}.lora_magnitude_vector" in tensors:  # of a base without biases
            assert update is not None, "DoRA has an update"
            whole = module.get_parameter("weight") + update
            scale = tensors[f"{key}.lora_magnitude_vector"] / whole.norm(dim=1)
            module.forward = _with_update(module.forward, scale[:, None] * whole - module.get_parameter("weight"))
        elif update is not None:
            module.forward = _with_update(module.forward, update)
        elif f"{key}.ia3_l" in tensors:
            scale = tensors[f"{key}.ia3_l"]
            is_input = scale.shape[0] == 1
            module.forward = _with_scale(module.forward, scale.flatten(), is_input)


def _update(config: dict[str, Any], tensors: dict[str, Tensor], key: str, inputs: int) -> Tensor | None:
    """What a low-rank method adds to the weight `[out, inputs]` of a module; None where it adds nothing."""
    own = {name.removeprefix(f"{key}."): tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
    match config["peft_type"]:
        case "LORA" if "lora_A.weight" in own:
            divisor = math.sqrt(config["r"]) if config["use_rslora"] else float(config["r"])
            return own["lora_B.weight"] @ own["lora_A.weight"] * (float(config["lora_alpha"]) / divisor)
        case "ADALORA" if "lora_A" in own:
            scaling = float(config["lora_alpha"]) / (float(config["init_r"]) + 1e-5)
            return own["lora_B"] @ (own["lora_A"] * own["lora_E"]) * scaling
        case "VERA" if "vera_lambda_d" in own:
            inner, outer = own["vera_lambda_d"], own["vera_lambda_b"]
            down, up = tensors["base_model.vera_A"][:, :inputs], tensors["base_model.vera_B"][: len(outer)]
            return outer[:, None] * (up @ (inner[:, None] * down))
        case _:
            return None


def _with_update(inner: Callable[[Tensor], Tensor], update: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: inner(x) + x @ update.T


def _with_scale(inner: Callable[[Tensor], Tensor], scale: Tensor, is_input: bool) -> Callable[[Tensor], Tensor]:
    return (lambda x: inner(x * scale)) if is_input else (lambda x: inner(x) * scale)
