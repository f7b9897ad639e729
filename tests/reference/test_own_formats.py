"""Law 2 for the formats of Medley's own: the same answer as the base alone with its modules changed accordingly.

All adapters and the base run in one batch, in random order of arrival, in small chunks and pages, preempted.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.model import FrozenBase
from tests.harness import Alone, alone, assert_same, greedy, load_first, make_engine, request, run
from tests.reference.adapters import configs, save_adapter
from tests.reference.bases import VOCABULARY, tiny_base

MAX_TOKENS = 10
# Biases and centred norms, weights stored transposed; norms of each head; a norm's weight less 1; norms of flat tokens.
ARCHITECTURES = ("llama", "gpt2", "qwen3", "gemma", "opt")
Tensors = dict[str, Tensor]


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]


def _width(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[-1]


def _after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: change(output))


def _after_input(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    module.register_forward_hook(lambda _module, inputs, output: change(inputs[0], output))


@torch.no_grad()
def _bitfit(model: PreTrainedModel) -> Tensors:
    """A bias for every linear module and norm, and every norm's weight."""
    tensors = {}
    for name, module in [*_linears(model), *_norms(model)]:
        tensors[f"{name}.bias"] = bias = torch.randn(_width(module)) * 0.2
        _after(module, lambda output, bias=bias: output + bias)  # type: ignore[misc]
    for name, module in _norms(model):
        tensors[f"{name}.weight"] = change = torch.randn(_width(module)) * 0.3
        module.weight.add_(change)  # type: ignore[operator]
    return tensors


@torch.no_grad()
def _adapter_bias(model: PreTrainedModel) -> Tensors:
    """At each layer's last linear module; one of them without a constant."""
    places = [name for name, _ in _linears(model) if name.endswith(("down_proj", "mlp.c_proj", "fc2"))]
    tensors = {}
    for name in places:
        module = model.get_submodule(name)
        width = module.get_parameter("weight").numel() // 32
        vector, weight, constant = torch.randn(32), torch.randn(1, width) * 0.3, torch.randn(1)
        if name == places[0]:
            constant = torch.zeros(1)
        else:
            tensors[f"{name}.adapter_bias.alpha.bias"] = constant
        tensors |= {f"{name}.adapter_bias.vector": vector, f"{name}.adapter_bias.alpha.weight": weight}
        _after_input(module, lambda x, y, v=vector, a=weight, c=constant: y + (x @ a.t() + c) * v)  # type: ignore[misc]
    return tensors


@torch.no_grad()
def _sparse(model: PreTrainedModel) -> Tensors:
    """At most 1 % of each weight, flat and in coordinates in turn, one place named twice."""
    tensors = {}
    for index, (name, module) in enumerate(_linears(model)[1:]):
        weight = nn.Parameter(module.weight.clone())  # type: ignore[operator]  # the output layer's may be shared
        count = weight.numel() // 100
        flat = torch.randint(weight.numel(), (count,))
        flat[-1] = flat[0]
        values = (torch.randn(count) * 3).to(weight.dtype)
        weight.view(-1).index_add_(0, flat, values)
        module.weight = weight
        coordinates = torch.stack([flat // weight.shape[1], flat % weight.shape[1]]).to(torch.int32)
        tensors[f"{name}.weight.indices"] = coordinates if index % 2 else flat
        tensors[f"{name}.weight.values"] = values
    return tensors


@torch.no_grad()
def _top_layers(model: PreTrainedModel) -> Tensors:
    """Everything in the last layer, and the last norm."""
    tensors = {}
    for name, module in [*_linears(model), *_norms(model)]:
        if ".1." in name or name.endswith((".norm", "ln_f", "decoder.final_layer_norm")):
            for part, parameter in module.named_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
                tensors[f"{name}.{part}"] = parameter.clone()
    return tensors


MAKERS = {
    "bitfit": ("named_deltas", _bitfit),
    "adapter_bias": ("named_deltas", _adapter_bias),
    "sparse": ("sparse", _sparse),
    "sparse again": ("sparse", _sparse),
    "top_layers": ("top_layers", _top_layers),
    "top_layers again": ("top_layers", _top_layers),
}


def _peft(architecture: str, name: str, prompt: list[int], folder: Path) -> Alone:
    """Save an adapter of PEFT's and return what it answers alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's, about these tiny bases
        save_adapter(tiny_base(architecture), configs(architecture)[name](), folder, 1)
        return alone(PeftModel.from_pretrained(tiny_base(architecture), folder).eval(), prompt, MAX_TOKENS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_answer_as_the_changed_base_alone(architecture: str, tmp_path: Path) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in (2, 17)]
    expected: dict[str, Alone] = {}
    requests = []
    for seed, name in enumerate(["base", *MAKERS]):
        model, folders = tiny_base(architecture), []
        if name in MAKERS:
            method, make = MAKERS[name]
            torch.manual_seed(seed)
            folders = [tmp_path / name]
            folders[0].mkdir()
            save_file(make(model), folders[0] / "adapter_model.safetensors")
            (folders[0] / "adapter_config.json").write_text(json.dumps({"medley_method": method}))
        for index, prompt in enumerate(prompts):
            expected[f"{name}/{index}"] = alone(model, prompt, MAX_TOKENS)
            requests.append(request(f"{name}/{index}", prompt, greedy(MAX_TOKENS), *folders))
    for name in ("lora", "prefix"):  # another library's, beside ours
        folder = tmp_path / name
        expected[name] = _peft(architecture, name, prompts[1], folder)
        requests.append(request(name, prompts[1], greedy(MAX_TOKENS), folder))
    base = FrozenBase(tiny_base(architecture))
    engine = make_engine(base, page_size=3, num_pages=24, max_batch_tokens=13, max_seqs=10)
    load_first(engine, requests)
    outcome = run(engine, requests, rng)
    engine.close()
    left_out = sum(assert_same(outcome.results[name], wanted, name) for name, wanted in expected.items())
    assert left_out <= len(expected) * MAX_TOKENS // 20, "too many steps near a tie to say that the answers agree"
    assert outcome.preemptions
    assert max(step.adapters for step in outcome.steps) > 3, "the methods were not mixed"
    assert len({tuple(wanted.tokens) for wanted in expected.values()}) > len(MAKERS), "the adapters change too little"
