"""Random adapters of each method, saved by PEFT itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from benchmarks.bases import random_base
from benchmarks.workload import Task, Workload
from server.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE

PROMPT = "prompt tuning"
PREFIX = "prefix tuning"
IA3 = "(IA)³"
LORA = "LoRA r=8 on q, v"

_CAUSAL = "CAUSAL_LM"
_VARIATION = 1e-5  # between neighbours among ten thousand variants: distinct in float32, of about one size

# P-tuning is absent: PEFT saves the prompt that its network made, and from there it is prompt tuning.
METHODS: dict[str, Callable[[int], PeftConfig]] = {  # from the number of virtual tokens
    PROMPT: lambda virtual: PromptTuningConfig(task_type=_CAUSAL, num_virtual_tokens=virtual),
    PREFIX: lambda virtual: PrefixTuningConfig(task_type=_CAUSAL, num_virtual_tokens=virtual),
    IA3: lambda _: IA3Config(
        task_type=_CAUSAL, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    LORA: lambda _: LoraConfig(task_type=_CAUSAL, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
}


def write_adapters(
    workload: Workload, folder: Path, methods: Collection[str] = tuple(METHODS)
) -> dict[str, list[Task]]:
    """`workload.tasks` adapters of every one of `methods`, in PEFT's own form under `folder`."""
    base = random_base(workload.size, workload.length)
    tasks: dict[str, list[Task]] = {}
    for number, (method, config) in enumerate(METHODS.items()):
        if method not in methods:
            continue
        tasks[method] = []
        for index in range(workload.tasks):
            name = f"m{number}t{index}"
            torch.manual_seed(number * workload.tasks + index)
            model = get_peft_model(base, config(workload.virtual_tokens))
            _randomise(model)
            model.save_pretrained(folder / name)
            tasks[method].append(Task(method, name, folder / name))
            if not model.active_peft_config.is_prompt_learning:
                model.unload()
    return tasks


def write_variants(pattern: Task, folder: Path, numbers: Iterable[int]) -> list[Task]:
    """For each of `numbers` a task like `pattern`, with tensors of its own: faster than PEFT, for thousands."""
    config = (pattern.folder / CONFIG_FILE).read_bytes()
    tensors = load_file(pattern.folder / WEIGHTS_FILE)
    tasks = []
    for number in numbers:
        name = f"{pattern.name}v{number}"
        (folder / name).mkdir(parents=True)
        (folder / name / CONFIG_FILE).write_bytes(config)
        factor = 1 + number * _VARIATION
        save_file({key: tensor * factor for key, tensor in tensors.items()}, folder / name / WEIGHTS_FILE)
        tasks.append(Task(pattern.method, name, folder / name))
    return tasks


def _randomise(model: torch.nn.Module) -> None:
    """Values that change the answers: the initial ones of (IA)³ and LoRA change nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "ia3_l" in name:
                parameter.normal_(mean=1.0, std=0.2)
            elif "lora_" in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5 / 2)
            else:
                parameter.normal_()
