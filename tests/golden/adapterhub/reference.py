"""AdapterHub's adapters on a plain `transformers` Llama, by the formulas of README.md, slowly.

`adapted(case)` gives the model of a folder of `cases/`, `answer` its greedy tokens, `class_logits` a head's logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import AutoModelForCausalLM

from tests.golden.adapterhub.bottleneck import Bottleneck, activation, fuse, linear, stack
from tests.golden.adapterhub.modules import (
    install_invertible,
    install_low_rank,
    install_prefix,
    install_reft,
    under,
)

HERE = Path(__file__).parent
Place = Callable[[Tensor, Tensor], Tensor]
_PLACES = {"attention_adapters": "mh_adapter", "output_adapters": "output_adapter"}  # and what the config says of it


def adapted(case: Path) -> Any:
    """The base with everything that the case's files hold, except a classification head."""
    model = AutoModelForCausalLM.from_pretrained(HERE / "base", attn_implementation="eager").eval()
    alone = (case / "adapter_config.json").exists()
    adapters = [_read(folder) for folder in ([case] if alone else [case / "first", case / "second"])]
    for name, configs, tensors in adapters:
        for config in configs:
            _install_other(model, name, config, tensors)
    for number, layer in enumerate(model.model.layers):
        after_attention, after_mlp = (_place(case, adapters, f"model.layers.{number}.{place}.") for place in _PLACES)
        layer.forward = partial(_block, layer, after_attention, after_mlp)
    if (case / "model_head.safetensors").exists():
        head = load_file(case / "model_head.safetensors")
        if "lm_head.weight" in head:  # of LlamaForCausalLM: the base's own unless it was trained
            model.lm_head.weight = torch.nn.Parameter(head["lm_head.weight"])
        elif _head_type(case) == "causal_lm":
            model.lm_head.forward = prediction_head(case)
    return model


def _head_type(case: Path) -> str | None:
    """None for the head of a class of `transformers`."""
    config = json.loads((case / "head_config.json").read_text())["config"] or {}
    return config.get("head_type")


def _read(folder: Path) -> tuple[str, list[dict[str, Any]], dict[str, Tensor]]:
    """An adapter's name, its config or the configs of its union, and its tensors."""
    saved = json.loads((folder / "adapter_config.json").read_text())
    config = saved["config"]
    configs = config["configs"] if config.get("architecture") == "union" else [config]
    return saved["name"], configs, load_file(folder / "adapter.safetensors")


def _install_other(model: Any, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What acts elsewhere than after the sub-blocks."""
    install = {"lora": install_low_rank, "prefix_tuning": install_prefix, "reft": install_reft}
    if architecture := config.get("architecture"):
        install[architecture](model, config, tensors, name)
    elif config["inv_adapter"]:
        install_invertible(model, config, tensors, name)


def _place(case: Path, adapters: list[tuple[str, list[dict[str, Any]], dict[str, Tensor]]], path: str) -> Place:
    """What the files put at one place of one layer."""
    found = []
    flag = _PLACES[path.rstrip(".").rsplit(".", 1)[-1]]
    for name, configs, tensors in adapters:
        own = under(tensors, f"{path}adapters.{name}.")
        shared = under(tensors, f"model.shared_parameters.{name}.")
        bottlenecks = [config for config in configs if not config.get("architecture") and config[flag]]
        found += [Bottleneck(config, own, shared) for config in bottlenecks if own]
    if not found:
        return lambda h, r: h + r
    folder = case / "first,second"
    if folder.exists():
        config = json.loads((folder / "adapter_fusion_config.json").read_text())["config"]
        tensors = under(
            load_file(folder / "model_adapter_fusion.safetensors"), f"{path}adapter_fusion_layer.first,second."
        )
        return partial(fuse, found, config, tensors)
    return partial(stack, found)


def _block(layer: Any, after_attention: Place, after_mlp: Place, hidden_states: Tensor, **options: Any) -> Tensor:
    """A decoder layer of Llama with its two places."""
    h, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
    r = after_attention(h, hidden_states)
    return after_mlp(layer.mlp(layer.post_attention_layernorm(r)), r)


@torch.no_grad()
def answer(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], Tensor, Tensor]:
    """Greedy tokens, their log-probabilities [new_tokens], and the logits [vocabulary] after the prompt.

    Without a cache: a gate averages over all tokens of a forward pass.
    """
    ids = list(prompt)
    logits = []
    for _ in range(new_tokens):
        logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(logits[-1].argmax()))
    tokens = ids[len(prompt) :]
    logprobs = torch.stack(logits).log_softmax(-1)[torch.arange(new_tokens), tokens]
    return tokens, logprobs, logits[0]


@torch.no_grad()
def class_logits(model: Any, case: Path, prompt: list[int]) -> Tensor:
    """A classification head on the last token's state, after the model's last norm: [labels]."""
    state = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
    return prediction_head(case)(state)


def prediction_head(case: Path) -> Callable[[Tensor], Tensor]:
    """The file's linear layers in order, the activation between them; a causal_lm head has norms there too."""
    config = json.loads((case / "head_config.json").read_text())["config"] or {}
    tensors = load_file(case / "model_head.safetensors")
    names = sorted({key.rsplit(".", 1)[0] for key in tensors})  # one digit each in these files

    def head(state: Tensor) -> Tensor:
        for name in names[:-1]:
            if tensors[f"{name}.weight"].dim() == 1:
                state = layer_norm(state, state.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-12)
                continue
            state = linear(tensors, name, state)
            if config["activation_function"]:
                state = activation(config["activation_function"])(state)
        return linear(tensors, names[-1], state)

    return head
