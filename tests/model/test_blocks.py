"""A base's sub-blocks are found in the data of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from server.adapters.deltas import output_scale
from server.model import DeltaKind, FrozenBase, RowDelta, Rows, Segment, SiteKind
from server.model.attention import AttentionOptions
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
    results = [name for name, site in base.sites.shapes.items() if site.kind is SiteKind.RESULT]
    assert results == [block.result_site for block in expected if block.is_attention]


@dataclass(frozen=True)
class _AddInput(DeltaKind):
    """y ← y + l ⊙ x."""

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        outputs.add_(inputs * blocks[0])


@dataclass
class _Queries:
    """An attention that gives its queries back, and notes those of a layer."""

    of_layer: int
    seen: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `Attention`."""
        if layer == self.of_layer:
            self.seen.append(query.flatten(1).clone())
        return query.contiguous()


def _one(delta: RowDelta, *tokens: int) -> list[list[Segment]]:
    (block,) = delta.blocks
    return [[Segment(torch.tensor(tokens), delta.kind, (Rows(block, 0, 1),), is_each=False)]]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
@torch.inference_mode()
def test_an_attention_s_result_is_changed_by_its_queries_before_its_block_is(architecture: str) -> None:
    torch.manual_seed(4)
    base = FrozenBase(tiny_base(architecture))
    block = [block for block in base.blocks if block.is_attention][1]
    output: nn.Module = base.model.get_submodule(block.output)
    given: list[Tensor] = []
    output.register_forward_hook(lambda module, inputs, outputs: given.extend((inputs[0][0].clone(), outputs[0])))
    factor = torch.randn(1, 32)
    plan = {
        block.result_site: _one(RowDelta(_AddInput(), (factor,)), 1, 3),
        block.site: _one(output_scale(torch.full((32,), 5.0)), 3, 4),
    }
    attention, ids, positions = _Queries(1), torch.arange(7, 13), torch.arange(6)
    base.forward(base.embed(ids), positions, attention, plan, positions)
    (queries,), (seen, changed) = attention.seen, given
    wanted = output(seen[None])[0]
    wanted[[1, 3]] += factor * queries[[1, 3]]
    wanted[[3, 4]] *= 5
    torch.testing.assert_close(changed, wanted)


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
