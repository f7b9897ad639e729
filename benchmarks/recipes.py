"""Random adapters of every method that the server knows, for the random Llama base.

PEFT itself makes and saves those that it has; the rest is written in its documented format: AdapterHub's (see
`recipes_adapterhub`), sparse updates, named deltas, top layers, text prompts. Values are the initial ones and noise:
speed does not depend on them, but an adapter that changes nothing would prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.bases import random_base
from benchmarks.recipe_files import Write, linears, noise, write_folder
from benchmarks.recipes_adapterhub import bottleneck, fusion, union
from benchmarks.workload import Task, Workload
from server.adapters.checkpoint import CONFIG_FILE, HUB_WEIGHTS_FILE, WEIGHTS_FILE

_CAUSAL = "CAUSAL_LM"
_QV = ["q_proj", "v_proj"]
_KV_DOWN = ["k_proj", "v_proj", "down_proj"]
_VARIATION = 1e-5  # between neighbours: distinct in float32, of one size
_SHARED = ("vera_A", "vera_B")  # PEFT's, the same in every adapter of one key
_DENSITY = 0.005


@dataclass(frozen=True)
class Recipe:
    """One row of the benchmark."""

    method: str  # its name in the table of methods
    variant: str  # of the method
    write: Write

    @property
    def title(self) -> str:
        """The row's."""
        return f"{self.method}, {self.variant}" if self.variant else self.method


def write_tasks(recipe: Recipe, workload: Workload, folder: Path) -> list[Task]:
    """`workload.tasks` adapters, none with the numbers of another but for what the method shares.

    Raises what PEFT raises where it cannot make the method for this base.
    """
    pattern = folder / "pattern"
    pattern.mkdir(parents=True)
    torch.manual_seed(0)
    with torch.no_grad():
        recipe.write(random_base(workload.size, workload.length), workload, pattern)
    tasks = []
    for index in range(workload.tasks):
        task = Task(recipe.title, f"t{index}", folder / f"t{index}")
        task.folder.mkdir()
        _write_variant(pattern, task.folder, index, workload)
        tasks.append(task)
    return tasks


def _write_variant(pattern: Path, folder: Path, index: int, workload: Workload) -> None:
    config = json.loads((pattern / CONFIG_FILE).read_text(encoding="utf-8"))
    if "token_ids" in config:
        config["token_ids"][-1] = index % workload.size.vocabulary
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    for name in (WEIGHTS_FILE, HUB_WEIGHTS_FILE):
        if (pattern / name).exists():
            tensors = load_file(pattern / name)
            save_file({key: _varied(key, tensor, index) for key, tensor in tensors.items()}, folder / name)


def _varied(key: str, tensor: Tensor, index: int) -> Tensor:
    if not tensor.is_floating_point() or key.endswith(_SHARED):
        return tensor
    return tensor * (1 + index * _VARIATION)


def _by_peft(config: Callable[[Workload], peft.PeftConfig]) -> Write:
    def write(base: PreTrainedModel, workload: Workload, folder: Path) -> None:
        with torch.enable_grad():
            model = peft.get_peft_model(base, config(workload))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise(parameter))
        model.save_pretrained(folder, save_embedding_layers=False)

    return write


def _own(method: str, make: Callable[[PreTrainedModel], Mapping[str, Tensor]]) -> Write:
    """In Medley's own format, tensors alone."""

    def write(base: PreTrainedModel, workload: Workload, folder: Path) -> None:
        write_folder(folder, {"medley_method": method}, make(base), WEIGHTS_FILE)

    return write


def _text_prompt(base: PreTrainedModel, workload: Workload, folder: Path) -> None:
    ids = torch.randint(workload.size.vocabulary, (workload.virtual_tokens,)).tolist()
    write_folder(folder, {"medley_method": "text_prompt", "token_ids": ids}, {}, WEIGHTS_FILE)


def _bitfit(base: PreTrainedModel) -> dict[str, Tensor]:
    """A bias for every linear module and every norm."""
    widths = {name: module.out_features for name, module in linears(base).items()}
    norms = {key.removesuffix(".weight"): len(weight) for key, weight in base.state_dict().items() if "norm" in key}
    return {f"{name}.bias": noise(torch.empty(width)) for name, width in {**widths, **norms}.items()}


def _adapter_bias(base: PreTrainedModel) -> dict[str, Tensor]:
    """At each layer's last linear module."""
    tensors: dict[str, Tensor] = {}
    for name, module in linears(base).items():
        if name.endswith("down_proj"):
            key = f"{name}.adapter_bias"
            tensors |= {
                f"{key}.vector": noise(torch.empty(module.out_features)),
                f"{key}.alpha.weight": noise(torch.empty(1, module.in_features)),
                f"{key}.alpha.bias": noise(torch.empty(1)),
            }
    return tensors


def _sparse(base: PreTrainedModel) -> dict[str, Tensor]:
    """Half a hundredth of every weight of the layers."""
    tensors = {}
    for name, module in linears(base).items():
        count = max(1, int(module.weight.numel() * _DENSITY))
        tensors[f"{name}.weight.indices"] = torch.randint(module.weight.numel(), (count,), dtype=torch.int32)
        tensors[f"{name}.weight.values"] = noise(torch.empty(count))
    return tensors


def _top_layers(base: PreTrainedModel) -> dict[str, Tensor]:
    """The last layer whole."""
    last = f"model.layers.{base.config.num_hidden_layers - 1}."
    state = base.state_dict()
    return {name: tensor + noise(tensor) for name, tensor in state.items() if name.startswith(last)}


def _lora(**settings: Any) -> Write:
    return _by_peft(lambda _: peft.LoraConfig(task_type=_CAUSAL, r=8, target_modules=_QV, **settings))


def _virtual(config: Callable[..., peft.PeftConfig], **settings: Any) -> Write:
    return _by_peft(lambda work: config(task_type=_CAUSAL, num_virtual_tokens=work.virtual_tokens, **settings))


def _targets(config: Callable[..., peft.PeftConfig], **settings: Any) -> Write:
    return _by_peft(lambda _: config(task_type=_CAUSAL, **{"target_modules": _QV, **settings}))


def _cpt(workload: Workload) -> peft.PeftConfig:
    ids = list(range(workload.virtual_tokens))
    return peft.CPTConfig(task_type=_CAUSAL, cpt_token_ids=ids, cpt_tokens_type_mask=[1 + index % 3 for index in ids])


def _adaption_prompt(workload: Workload) -> peft.PeftConfig:
    return peft.AdaptionPromptConfig(
        task_type=_CAUSAL, adapter_len=workload.virtual_tokens, adapter_layers=workload.size.layers
    )


RECIPES = (
    Recipe("text_prompt", "", _text_prompt),
    Recipe("prompt_tuning", "", _virtual(peft.PromptTuningConfig)),
    Recipe("p_tuning", "", _virtual(peft.PromptEncoderConfig, encoder_hidden_size=64)),
    Recipe("multitask_prompt_tuning", "", _virtual(peft.MultitaskPromptTuningConfig, num_tasks=2, num_ranks=1)),
    Recipe("cpt", "", _by_peft(_cpt)),
    Recipe("prefix_tuning", "", _virtual(peft.PrefixTuningConfig)),
    Recipe("cartridge", "", _virtual(peft.CartridgeConfig, num_frozen_tokens=1)),
    Recipe("ia3", "", _targets(peft.IA3Config, target_modules=_KV_DOWN, feedforward_modules=_KV_DOWN[2:])),
    Recipe("lora", "", _lora()),
    Recipe("lora", "DoRA", _lora(use_dora=True)),
    Recipe("adalora", "", _targets(peft.AdaLoraConfig, init_r=8, total_step=10)),
    Recipe("vera", "", _targets(peft.VeraConfig, r=64)),
    Recipe("loha", "", _targets(peft.LoHaConfig, r=8)),
    Recipe("lokr", "", _targets(peft.LoKrConfig, r=8)),
    Recipe("miss", "", _targets(peft.MissConfig, r=8)),
    Recipe("hra", "", _targets(peft.HRAConfig, r=8)),
    Recipe("c3a", "", _targets(peft.C3AConfig, block_size=16)),
    Recipe("road", "", _targets(peft.RoadConfig, group_size=16)),
    Recipe("shira", "", _targets(peft.ShiraConfig, r=2)),
    Recipe("beft", "", _targets(peft.BeftConfig)),
    Recipe(
        "trainable_tokens", "", _by_peft(lambda _: peft.TrainableTokensConfig(task_type=_CAUSAL, token_indices=[1]))
    ),
    Recipe("ln_tuning", "", _targets(peft.LNTuningConfig, target_modules=".*norm")),
    Recipe("adaption_prompt", "", _by_peft(_adaption_prompt)),
    Recipe("bottleneck", "seq_bn", bottleneck("output_adapter")),
    Recipe("bottleneck", "double_seq_bn", bottleneck("mh_adapter", "output_adapter", original_ln_before=False)),
    Recipe("bottleneck", "par_bn", bottleneck("output_adapter", is_parallel=True, scaling=4.0)),
    Recipe("adapter_fusion", "two seq_bn", fusion),
    Recipe("union", "LoRA and seq_bn", union),
    Recipe("named_deltas", "BitFit", _own("named_deltas", _bitfit)),
    Recipe("named_deltas", "AdapterBias", _own("named_deltas", _adapter_bias)),
    Recipe("sparse", "0.5 %", _own("sparse", _sparse)),
    Recipe("top_layers", "the last one", _own("top_layers", _top_layers)),
)
