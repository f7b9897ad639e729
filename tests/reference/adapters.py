"""PEFT adapters with values that matter, made and saved by PEFT itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel

CAUSAL = "CAUSAL_LM"

# Per architecture: modules that take LoRA and (IA)³ outputs, and the one whose input (IA)³ scales.
_MODULES: dict[str, tuple[list[str], str]] = {
    "llama": (["q_proj", "v_proj", "lm_head"], "down_proj"),
    "gpt2": (["c_attn", "mlp.c_fc"], "mlp.c_proj"),
    "opt": (["q_proj", "k_proj"], "fc2"),
    "gpt_neox": (["query_key_value"], "dense_4h_to_h"),
    "qwen2": (["q_proj", "v_proj", "up_proj"], "down_proj"),
    "qwen3": (["k_proj", "o_proj"], "down_proj"),
    "mistral": (["q_proj", "v_proj"], "down_proj"),
    "gemma": (["q_proj", "v_proj"], "down_proj"),
    "phi3": (["qkv_proj", "gate_up_proj"], "down_proj"),
}


def configs(architecture: str) -> dict[str, Callable[[], PeftConfig]]:
    """Every method, as it is configured for an architecture."""
    modules, feedforward = _MODULES[architecture]
    return {
        "prompt": lambda: PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=5),
        "long_prompt": lambda: PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=13),
        "p_tuning": lambda: PromptEncoderConfig(task_type=CAUSAL, num_virtual_tokens=4, encoder_hidden_size=24),
        "prefix": lambda: PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=6),
        "projected_prefix": lambda: PrefixTuningConfig(
            task_type=CAUSAL, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=24
        ),
        "ia3": lambda: IA3Config(
            task_type=CAUSAL, target_modules=[*modules, feedforward], feedforward_modules=[feedforward]
        ),
        "lora": lambda: LoraConfig(task_type=CAUSAL, r=4, lora_alpha=8, target_modules=modules),
        "lora_patterns": lambda: LoraConfig(
            task_type=CAUSAL,
            r=3,
            lora_alpha=6,
            target_modules=[*modules, feedforward],
            rank_pattern={modules[0]: 7},
            alpha_pattern={modules[0]: 5, feedforward: 12},
            use_rslora=True,
        ),
        "lora_one_layer": lambda: LoraConfig(
            task_type=CAUSAL, r=2, lora_alpha=9, target_modules=[feedforward], layers_to_transform=[1]
        ),
    }


def save_adapter(base: PreTrainedModel, config: PeftConfig, folder: Path, seed: int) -> None:
    """Write a PEFT folder whose adapter changes the base's outputs. Leaves `base` as it was."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                _spread(name, parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    if not config.is_prompt_learning:
        model.unload()


def _spread(name: str, parameter: torch.Tensor) -> None:
    """Values of the order that training gives."""
    if "ia3_l" in name:
        parameter.normal_(mean=1.0, std=0.4)
    elif "lora_" in name:
        parameter.normal_(std=0.25)
    else:
        parameter.normal_(std=0.35)
