"""From a PEFT adapter of another method to a LoRA: what `medley convert --to-lora` does

The adapter is loaded on its base. The factors of each module's change of weight ΔW are PEFT's own (`convert_to_lora`, a
truncated singular value decomposition) where PEFT converts the method; of methods that multiply the weight (OFT, BOFT,
HRA, …) ΔW is the merged weight less the base's, decomposed here in the same way. By Eckart and Young (1936) no LoRA of
that rank is nearer. The error of a module is ‖ΔW - BA‖ / ‖ΔW‖ (Frobenius).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft import convert_to_lora as factors_by_peft
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from server.cli.errors import CommandError
from server.cli.pickles import make_folder, pickled_tensors

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."  # of PEFT's names
_TASK = "CAUSAL_LM"
_NAME = "default"  # of the one adapter that is loaded


@dataclass(frozen=True)
class Converted:
    """A LoRA in PEFT's names, and by module how far it is from the adapter."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    errors: dict[str, float]


def convert_to_lora(source: Path, base: str, rank: int) -> Converted:
    """The nearest LoRA of that rank. Raises `CommandError` for an adapter that has none."""
    model = _load(source, base)
    errors = {}
    try:
        if model.supports_lora_conversion():
            config, tensors = factors_by_peft(model, rank)
        else:
            config, tensors = _factors(model, rank)
        for name, change in _changes(model):
            key = f"{_PREFIX}{name}.lora_"
            if f"{key}A.weight" not in tensors:
                raise ValueError(f"PEFT's conversion leaves out {name}")
            approximation = tensors[f"{key}B.weight"].float() @ tensors[f"{key}A.weight"].float()
            size = float(change.norm())
            errors[name] = float((change - approximation).norm()) / size if size else float(approximation.norm())
    except (TypeError, ValueError) as error:
        raise CommandError(f"{source}: {error}") from None
    config.task_type = _TASK
    return Converted(config, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, errors)


def write(converted: Converted, output: Path) -> None:
    """Write the folder."""
    make_folder(output)
    config = converted.config
    config.inference_mode = True
    config.save_pretrained(str(output))
    save_file(converted.tensors, output / _WEIGHTS)


def _load(source: Path, base: str) -> PeftModel:
    try:
        config: Any = json.loads((source / _CONFIG).read_bytes())
    except (OSError, ValueError):
        raise CommandError(f"{source} has no {_CONFIG} that can be read; give the folder that PEFT wrote") from None
    if not isinstance(config, dict) or config.get("task_type") not in (None, _TASK) or config.get("modules_to_save"):
        message = f"{source} is no PEFT adapter of task_type {_TASK} without modules_to_save; no other is converted"
        raise CommandError(message)
    if config.get("bias") not in (None, False, "none"):
        raise CommandError(f"{source}: bias is {config['bias']!r}; the LoRA would lack the biases that were trained")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT, about bases that it does not know by name
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
            loaded = PeftModel.from_pretrained(model, str(source), adapter_name=_NAME).eval()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning) as error:
        raise CommandError(f"{source} cannot be loaded on {base}: {error}") from None
    for name in sorted(_saved(source) - set(get_peft_model_state_dict(loaded, adapter_name=_NAME))):
        raise CommandError(f"{source}: tensor {name} belongs to no module of {base} that the config targets")
    return loaded


def _saved(source: Path) -> set[str]:
    """Names of the adapter's tensors; PEFT leaves out without a word those that it has no place for."""
    if not (source / _WEIGHTS).is_file():
        return set(pickled_tensors(source / _PICKLED))
    with safe_open(source / _WEIGHTS, "pt") as file:
        return set(file.keys())


def _factors(model: PeftModel, rank: int) -> tuple[LoraConfig, dict[str, Tensor]]:
    """As `peft.convert_to_lora`, for methods that it does not convert."""
    tensors: dict[str, Tensor] = {}
    for name, change in _changes(model):
        if rank > min(change.shape):
            raise ValueError(f"rank {rank} is more than {name} {list(change.shape)} has")
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = right[:rank]
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = left[:, :rank] * values[:rank]
    names = [key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in tensors if key.endswith("A.weight")]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=names), tensors


@torch.no_grad()
def _changes(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Each changed module's name and ΔW `[out, in]`, found by merging the adapter and taking it off again."""
    found = False
    for full_name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not hasattr(module, "merge"):
            continue
        found = True
        base, name = module.get_base_layer(), full_name.removeprefix(_PREFIX)
        if not isinstance(base, (torch.nn.Linear, Conv1D)):
            raise ValueError(f"{name} is no linear module, and no other can be converted")
        weight, bias = base.weight.data.clone(), None if base.bias is None else base.bias.data.clone()
        module.merge(safe_merge=True, adapter_names=[_NAME])
        change = base.weight.data - weight
        merged_bias = None if base.bias is None else base.bias.data
        module.merged_adapters.clear()
        base.weight.data = weight
        if bias is not None and merged_bias is not None:
            base.bias.data = bias
            if not torch.equal(bias, merged_bias):
                raise ValueError(f"the adapter also changes the bias of {name}, which a LoRA's factors do not")
        yield name, (change.t() if isinstance(base, Conv1D) else change).float()
    if not found:
        raise ValueError("the adapter changes no weights that could be merged, so there is no LoRA like it")
