"""Which layers are found to have the usual form: those whose classes give what programs give, and no others."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from server.model import FrozenBase
from tests.model.mixing import Mixing, own_logits
from tests.reference.bases import VOCABULARY, tiny_base

pytestmark = pytest.mark.usefixtures("blocked_weights")

LOOKING_ALIKE: dict[str, tuple[dict[str, Any], list[str]]] = {  # what is special, and the layers of the usual form
    "granite": ({"residual_multiplier": 0.5}, []),
    "smollm3": ({"no_rope_layers": [1, 0]}, ["model.layers.0"]),  # the second does not rotate
    "olmo2": ({}, []),  # norms behind the sub-blocks
}


def _small(architecture: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(9)
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            **changes,
        },
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("architecture", LOOKING_ALIKE)
@torch.inference_mode()
def test_classes_that_look_alike_keep_their_own_layers(architecture: str) -> None:
    changes, expected = LOOKING_ALIKE[architecture]
    assert FrozenBase(_small(architecture, **changes)).layer_programs == expected


@torch.inference_mode()
def test_a_layer_that_asks_for_the_position_itself_keeps_its_own_forward() -> None:
    """Its queries are scaled from some position on, which the first positions do not show."""
    model = _small("mistral")
    layers: Any = model.model.layers
    layers[0].forward = _scaled_from_position(layers[0].forward, 40)
    assert FrozenBase(model).layer_programs == ["model.layers.1"]


def _scaled_from_position(forward: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
    def changed(hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        factor = 1 + 0.05 * (named["position_ids"][..., None] >= first)
        return forward(hidden * factor, *others, **named)

    return changed


class _Bounded(nn.Module):
    """An activation with an upper bound that only large inputs meet."""

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.silu(inputs).clamp(max=13)


@torch.inference_mode()
def test_a_bound_on_large_values_keeps_the_class_sown_logits() -> None:
    model = tiny_base("llama")
    layers: Any = model.model.layers
    layers[1].mlp.act_fn = _Bounded()  # of what the trial of an activation sees it bounds nothing
    assert FrozenBase(model).layer_programs == ["model.layers.0"]


@torch.inference_mode()
def test_a_class_that_changes_what_one_layer_passes_to_the_next_keeps_its_own_layers() -> None:
    model = tiny_base("llama")
    layers: Any = model.model.layers

    def change(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].add_(1)  # in place: the next layer is given the very tensor that this one gave

    layers[1].register_forward_pre_hook(change)
    assert FrozenBase(model).layer_programs == []


def _eager_with_sinks(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **named: Any) -> Any:
    k, v = (modeling_llama.repeat_kv(part, module.num_key_value_groups) for part in (k, v))
    scores = q @ k.transpose(2, 3) * named["scaling"] + (0 if mask is None else mask)
    sinks = named["s_aux"].view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("is_kept", [True, False])
@torch.inference_mode()
def test_a_class_that_makes_its_sinks_anew_keeps_its_own_layers(is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs name the address of the sinks, which in a class that keeps them are the same tensor in every call."""
    sinks, own = torch.linspace(-1, 1, 4), modeling_llama.LlamaAttention.forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        return own(self, *arguments, **named, s_aux=sinks if is_kept else sinks.clone())

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", _eager_with_sinks)
    assert len(FrozenBase(tiny_base("llama")).layer_programs) == (2 if is_kept else 0)


@torch.inference_mode()
def test_layers_of_another_width_keep_theirown_logits() -> None:
    model = tiny_base("llama")
    config = deepcopy(model.config)
    config.intermediate_size *= 2
    layers: Any = model.model.layers
    layers[1].mlp = type(layers[1].mlp)(config).requires_grad_(False)
    ids = torch.arange(20)
    base = FrozenBase(deepcopy(model))
    assert base.layer_programs == ["model.layers.0"]
    expected, _ = own_logits(model, ids, ids)
    torch.testing.assert_close(base.forward(base.embed(ids), ids, Mixing(), {}, ids), expected, rtol=1e-4, atol=1e-4)


def _scaled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def changed(hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        return forward(hidden, *others, **named) + hidden * 1e-3

    return changed


def _without_angles(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def changed(hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        cos, sin = named.pop("position_embeddings")
        return forward(hidden, *others, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **named)

    return changed


@pytest.mark.parametrize("change", [_scaled, _without_angles])
@torch.inference_mode()
def test_a_layer_that_only_looks_alike_keeps_its_own_forward(
    change: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
) -> None:
    model = tiny_base("llama")
    layers: Any = model.model.layers
    layers[0].forward = change(layers[0].forward)
    assert FrozenBase(model).layer_programs == ["model.layers.1"]


@torch.inference_mode()
def test_an_activation_without_a_kernel_keeps_the_class_sown_logits() -> None:
    model = tiny_base("llama")
    layers: Any = model.model.layers
    layers[1].mlp.act_fn = nn.Tanh()
    assert FrozenBase(model).layer_programs == ["model.layers.0"]
