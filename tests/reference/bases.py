"""Tiny random bases, one for each architecture that Medley promises."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_GATED, "tie_word_embeddings": False},
    "gpt2": {"n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"intermediate_size": 48},
    "qwen2": {**_GATED, "tie_word_embeddings": True},
    "qwen3": {**_GATED, "head_dim": 16},
    "mistral": {**_GATED, "sliding_window": 9},
    "gemma": {**_GATED, "num_key_value_heads": 1, "head_dim": 16},
    "phi3": {**_GATED},
}

# Factors on the initial values: without them every output is the same few tokens.
_EMBEDDING_SPREAD = 3.0
_MATRIX_SPREAD = 12.0


def tiny_base(architecture: str) -> PreTrainedModel:
    """A float32 model whose greedy outputs vary; the same at every call."""
    torch.manual_seed(17)
    config = AutoConfig.for_model(architecture, **_COMMON, **ARCHITECTURES[architecture])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                is_embedding = any(word in name for word in ("embed", "wte", "wpe", "lm_head"))
                parameter.mul_(_EMBEDDING_SPREAD if is_embedding else _MATRIX_SPREAD)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
    return model.eval()
