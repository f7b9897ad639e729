"""PEFT adapters with values that matter, made and saved by PEFT itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BeftConfig,
    C3AConfig,
    CartridgeConfig,
    CPTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import PreTrainedModel

from tests.reference.bases import VOCABULARY

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


_WITH_ADAPTION_PROMPT = ("llama", "mistral", "gpt2")  # that PEFT's LLaMA-Adapter takes
_NORMS = r".*(norm|\.ln_[12f])"


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
        "cartridge": lambda: CartridgeConfig(task_type=CAUSAL, num_virtual_tokens=4, num_frozen_tokens=1),
        "cpt": lambda: CPTConfig(task_type=CAUSAL, cpt_token_ids=[5, 3, 9], cpt_tokens_type_mask=[1, 2, 3]),
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
        **_low_rank(architecture),
        **_of_the_embedding(architecture),
        "ln_tuning": lambda: LNTuningConfig(task_type=CAUSAL, target_modules=_NORMS),
        **({"adaption_prompt": _adaption_prompt} if architecture in _WITH_ADAPTION_PROMPT else {}),
    }


# The first targeted module of each layer, for the architectures that the whole low-rank family is tested with.
_RANKED = {
    "llama": "model.layers.{}.self_attn.q_proj",
    "gpt2": "transformer.h.{}.attn.c_attn",
    "opt": "model.decoder.layers.{}.self_attn.q_proj",
    "qwen2": "model.layers.{}.self_attn.q_proj",
}


_EMBEDDINGS = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte"}
_TRAINED_TOKENS = [0, *range(3, VOCABULARY, 2)]  # so many that every prompt and answer has some


def _low_rank(architecture: str) -> dict[str, Callable[[], PeftConfig]]:
    """LoRA's variants and relatives."""
    if architecture not in _RANKED:
        return {}
    modules, feedforward = _MODULES[architecture]
    targets = [*modules, feedforward]
    ranks = [[True, False, True, True], [False] * 4]
    pattern = {f"{_RANKED[architecture].format(layer)}.lora_E": left for layer, left in enumerate(ranks)}
    cases: dict[str, Callable[[], PeftConfig]] = {
        "dora": lambda: LoraConfig(
            task_type=CAUSAL, r=3, target_modules=targets, use_dora=True, use_rslora=True, bias="lora_only"
        ),
        "lora_biases": lambda: LoraConfig(task_type=CAUSAL, r=2, target_modules=targets, lora_bias=True, bias="all"),
        "adalora": lambda: AdaLoraConfig(
            task_type=CAUSAL,
            init_r=4,
            lora_alpha=9,
            target_modules=targets,
            total_step=10,
            rank_pattern=pattern,
            bias="lora_only",
        ),
        "vera": lambda: VeraConfig(task_type=CAUSAL, r=7, target_modules=targets),
        "vera_drawn": lambda: VeraConfig(
            task_type=CAUSAL, r=5, target_modules=targets, save_projection=False, projection_prng_key=3
        ),
    }
    if architecture != "gpt2":  # PEFT has them for nn.Linear only
        cases["loha"] = lambda: LoHaConfig(
            task_type=CAUSAL, r=4, alpha=3, target_modules=targets, rank_pattern={feedforward: 7}
        )
        cases["miss"] = lambda: MissConfig(task_type=CAUSAL, r=5, target_modules=targets)
        cases["mini_miss"] = lambda: MissConfig(
            task_type=CAUSAL, r=4, mini_r=8, init_weights="mini", target_modules=[modules[0], feedforward]
        )
        cases |= _of_linear_modules(modules, feedforward)
        cases["lokr"] = lambda: LoKrConfig(
            task_type=CAUSAL,
            r=2,
            target_modules=targets,
            decompose_both=True,
            rank_pattern={feedforward: 8},
            alpha_pattern={modules[0]: 3},
        )
    return cases


def _of_linear_modules(modules: list[str], feedforward: str) -> dict[str, Callable[[], PeftConfig]]:
    """Methods that PEFT has for nn.Linear only."""
    targets = [module for module in modules if module != "lm_head"] + [feedforward]
    return {
        "hra": lambda: HRAConfig(task_type=CAUSAL, r=3, target_modules=[*modules, feedforward]),
        "hra_orthogonal": lambda: HRAConfig(task_type=CAUSAL, r=4, apply_GS=True, target_modules=targets),
        "c3a": lambda: C3AConfig(
            task_type=CAUSAL, block_size=8, block_size_pattern={feedforward: 4}, target_modules=targets
        ),
        "road": lambda: RoadConfig(task_type=CAUSAL, group_size=8, target_modules=targets),
        "road_2": lambda: RoadConfig(task_type=CAUSAL, variant="road_2", group_size=2, target_modules=targets),
        "road_4": lambda: RoadConfig(task_type=CAUSAL, variant="road_4", group_size=16, target_modules=targets),
        "shira": lambda: ShiraConfig(task_type=CAUSAL, r=1, random_seed=3, target_modules=targets),
        "beft": lambda: BeftConfig(task_type=CAUSAL, target_modules=targets),
    }


def _of_the_embedding(architecture: str) -> dict[str, Callable[[], PeftConfig]]:
    """Low rank and single rows. Llama's output layer has a weight of its own, the others' is the embedding's."""
    if architecture not in _EMBEDDINGS:
        return {}
    embedding, module = _EMBEDDINGS[architecture], _MODULES[architecture][0][0]
    return {
        "lora_embedding": lambda: LoraConfig(
            task_type=CAUSAL,
            r=5,
            lora_alpha=7,
            target_modules=[module, embedding],
            rank_pattern={embedding: 3},
            use_rslora=True,
        ),
        "lora_tokens": lambda: LoraConfig(
            task_type=CAUSAL, r=2, target_modules=[module], trainable_token_indices=_TRAINED_TOKENS
        ),
        "trainable_tokens": lambda: TrainableTokensConfig(task_type=CAUSAL, token_indices=_TRAINED_TOKENS[::-1]),
    }


def _adaption_prompt() -> PeftConfig:
    return AdaptionPromptConfig(task_type=CAUSAL, adapter_len=5, adapter_layers=1)


def save_adapter(base: PreTrainedModel, config: PeftConfig, folder: Path, seed: int) -> None:
    """Write a PEFT folder whose adapter changes the base's outputs. Leaves `base` as it was."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                _spread(name, parameter)
    model.save_pretrained(folder)  # as by default, with the base's output layer where that is targeted
    if not (config.is_prompt_learning or config.is_adaption_prompt):  # PEFT cannot take the latter off again
        model.unload()


def _spread(name: str, parameter: torch.Tensor) -> None:
    """Values of the order that training gives."""
    if "ia3_l" in name:
        parameter.normal_(mean=1.0, std=0.4)
    elif "magnitude" in name:
        parameter.mul_(torch.empty_like(parameter).normal_(mean=1.0, std=0.4))
    elif "lora_E" in name:
        parameter.normal_()
    elif "lora_" in name:
        parameter.normal_(std=0.25)
    else:
        parameter.normal_(std=0.35)
