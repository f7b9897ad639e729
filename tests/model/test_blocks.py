"""A base's sub-blocks are found in the data of a forward pass."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from server.model import FrozenBase, SiteKind
from server.model.blocks import Block
from tests.reference.bases import tiny_base

# The names of the two norms and the two last linear modules of a layer.
_NAMES = {
    "llama": ("model.layers.{}", "input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"),
    "gpt2": ("transformer.h.{}", "ln_1", "attn.c_proj", "ln_2", "mlp.c_proj"),
    "opt": ("model.decoder.layers.{}", "self_attn_layer_norm", "self_attn.out_proj", "final_layer_norm", "fc2"),
    "qwen3": ("model.layers.{}", "input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"),
}


@pytest.mark.parametrize("architecture", _NAMES)
def test_the_sub_blocks_are_between_a_norm_and_a_linear_module(architecture: str) -> None:
    base = FrozenBase(tiny_base(architecture))
    expected = []
    for layer in range(2):
        path, *names = _NAMES[architecture]
        stem = path.format(layer)
        before, attention, between, feedforward = (f"{stem}.{name}" for name in names)
        expected += [Block(stem, True, before, attention), Block(stem, False, between, feedforward)]
    assert list(base.blocks) == expected
    assert all(base.sites.shapes[block.site].kind is SiteKind.BLOCK for block in expected)


def _other(architecture: str, **config: Any) -> FrozenBase:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    made = AutoConfig.for_model(architecture, **sizes, intermediate_size=40, max_position_embeddings=64, **config)
    return FrozenBase(AutoModelForCausalLM.from_config(made, attn_implementation="eager"))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gpt_neox", {"use_parallel_residual": True}),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}),
        ("granite", {"residual_multiplier": 0.5, "num_key_value_heads": 2}),
    ],
)
def test_a_base_that_adds_otherwise_has_none(architecture: str, config: dict[str, Any]) -> None:
    assert _other(architecture, **config).blocks == ()


def test_the_layers_of_one_class_may_be_one_way_or_the_other() -> None:
    assert len(_other("gpt_neox", use_parallel_residual=False).blocks) == 4
