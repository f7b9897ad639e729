"""Random adapters in AdapterHub's format: bottlenecks, a fusion and a union of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.recipe_files import Write, linears, noise, write_folder
from benchmarks.workload import Workload
from server.adapters.checkpoint import HUB_WEIGHTS_FILE

_REDUCTION = 16
_HUB = {"name": "task", "model_type": "llama", "version": "adapters.1.3.0"}
_HUB_PLACES = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}
_SEQ_BN = {"output_adapter": True, "non_linearity": "relu", "original_ln_before": True}
_QV = ("q_proj", "v_proj")


def bottleneck(*places: str, **settings: Any) -> Write:
    """AdapterHub's, `places` among `mh_adapter`, `output_adapter`."""
    config = {
        "mh_adapter": "mh_adapter" in places,
        "output_adapter": "output_adapter" in places,
        "reduction_factor": _REDUCTION,
        "non_linearity": "relu",
        "original_ln_before": not settings.get("is_parallel", False),
        **settings,
    }

    def write(base: PreTrainedModel, workload: Workload, folder: Path) -> None:
        tensors = {name: part for place in places for name, part in _networks("task", place, workload).items()}
        write_folder(folder, {**_HUB, "config": config}, tensors, HUB_WEIGHTS_FILE)

    return write


def _networks(name: str, place: str, workload: Workload) -> dict[str, Tensor]:
    """A bottleneck's tensors in all layers."""
    width, narrow = workload.size.width, max(1, workload.size.width // _REDUCTION)
    tensors: dict[str, Tensor] = {}
    for layer in range(workload.size.layers):
        key = f"model.layers.{layer}.{_HUB_PLACES[place]}.adapters.{name}"
        tensors |= {
            f"{key}.adapter_down.0.weight": noise(torch.empty(narrow, width)),
            f"{key}.adapter_down.0.bias": noise(torch.empty(narrow)),
            f"{key}.adapter_up.weight": noise(torch.empty(width, narrow)),
            f"{key}.adapter_up.bias": noise(torch.empty(width)),
        }
    return tensors


def fusion(base: PreTrainedModel, workload: Workload, folder: Path) -> None:
    """Of two `seq_bn`."""
    width, names = workload.size.width, ["first", "second"]
    tensors = {key: part for name in names for key, part in _networks(name, "output_adapter", workload).items()}
    for layer in range(workload.size.layers):
        key = f"model.layers.{layer}.output_adapters.adapter_fusion_layer.first,second"
        tensors |= {f"{key}.{part}.weight": noise(torch.empty(width, width)) for part in ("query", "key", "value")}
        tensors |= {f"{key}.{part}.bias": noise(torch.empty(width)) for part in ("query", "key")}
    own = {**_SEQ_BN, "reduction_factor": _REDUCTION}
    outer = {
        **_HUB,
        "name": "first,second",
        "config": {},
        "adapter_names": names,
        "adapters": dict.fromkeys(names, own),
    }
    write_folder(folder, outer, tensors, HUB_WEIGHTS_FILE)


def union(base: PreTrainedModel, workload: Workload, folder: Path) -> None:
    """Of a LoRA of rank 8 and a `seq_bn`."""
    lora = {"architecture": "lora", "composition_mode": "add", "r": 8, "alpha": 8, "selfattn_lora": True}
    tensors = _networks("task", "output_adapter", workload)
    for name, module in linears(base).items():
        if name.endswith(_QV):
            tensors[f"{name}.loras.task.lora_A"] = noise(torch.empty(8, module.in_features))
            tensors[f"{name}.loras.task.lora_B"] = noise(torch.empty(module.out_features, 8))
    configs = [{**lora, "attn_matrices": ["q", "v"]}, {**_SEQ_BN, "reduction_factor": _REDUCTION}]
    write_folder(folder, {**_HUB, "config": {"architecture": "union", "configs": configs}}, tensors, HUB_WEIGHTS_FILE)
