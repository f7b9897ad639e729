"""Decoder layers as programs give what their classes give, for the classes of the usual form and for no others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from server.adapters.deltas import input_scale, low_rank, output_scale, shift
from server.model import FrozenBase, Rows, Segment, SitePlan
from server.model.attention import IMPLEMENTATION, AttentionOptions
from server.model.delta_kernels import DeltaKernels
from server.model.layer_operations import PRODUCTS
from server.model.layer_programs import LayerStack
from server.model.program_kernels import MOST_TOKENS
from server.model.row_deltas import RowDelta
from server.model.sites import SiteKind, SiteShape
from tests.model.packed import for_many_tokens
from tests.reference.bases import VOCABULARY, tiny_base

pytestmark = pytest.mark.usefixtures("blocked_weights")

USUAL = ("llama", "qwen2", "qwen3", "mistral", "gemma")
OTHERS = ("gpt2", "opt", "gpt_neox", "phi3")
LOOKING_ALIKE: dict[str, tuple[dict[str, Any], list[str]]] = {  # what is special, and the layers of the usual form
    "granite": ({"residual_multiplier": 0.5}, []),
    "smollm3": ({"no_rope_layers": [1, 0]}, ["model.layers.0"]),  # the second does not rotate
    "olmo2": ({}, []),  # norms behind the sub-blocks
}
KERNELS = DeltaKernels()


class Mixing:
    """An attention of each token by itself, which shows its queries, keys and values; and what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, AttentionOptions]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self.asked.append((layer, options))
        heads = query.shape[1] // key.shape[1]
        return query * key.sum(-1, keepdim=True).repeat_interleave(heads, 1).tanh() - value.repeat_interleave(heads, 1)


def _own(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> tuple[Tensor, Mixing]:
    """Logits of the class itself, nothing of it changed."""
    model.set_attn_implementation(IMPLEMENTATION)
    mixing = Mixing()
    inputs = model.get_input_embeddings()(ids[None])
    output = model(inputs_embeds=inputs, position_ids=positions[None], use_cache=False, medley_attention=mixing)
    return output.logits[0], mixing


@pytest.mark.parametrize("architecture", USUAL + OTHERS)
@torch.inference_mode()
def test_programs_give_the_logits_of_the_class(architecture: str) -> None:
    model = tiny_base(architecture)
    base = FrozenBase(deepcopy(model))
    assert len(base.layer_programs) == (2 if architecture in USUAL else 0)
    for tokens in (1, 2, 5, 6, 7, 13, 48, 49, 200, MOST_TOKENS, MOST_TOKENS + 1):
        ids = torch.arange(tokens) * 7 % VOCABULARY
        positions = torch.arange(tokens) * 11 % base.max_model_len
        expected, asked = _own(model, ids, positions)
        mixing = Mixing()
        logits = base.forward(base.embed(ids), positions, mixing, {}, torch.arange(tokens))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert mixing.asked == asked.asked


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
def test_a_bound_on_large_values_keeps_the_class_s_own() -> None:
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
def test_layers_of_another_width_keep_their_own() -> None:
    model = tiny_base("llama")
    config = deepcopy(model.config)
    config.intermediate_size *= 2
    layers: Any = model.model.layers
    layers[1].mlp = type(layers[1].mlp)(config).requires_grad_(False)
    ids = torch.arange(20)
    base = FrozenBase(deepcopy(model))
    assert base.layer_programs == ["model.layers.0"]
    expected, _ = _own(model, ids, ids)
    torch.testing.assert_close(base.forward(base.embed(ids), ids, Mixing(), {}, ids), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_step_without_tokens_is_the_class_s_own_matter() -> None:
    base = FrozenBase(tiny_base("llama"))
    nothing = torch.empty(0, dtype=torch.long)
    with pytest.raises(RuntimeError, match="0 elements"):
        base.forward(base.embed(nothing), nothing, Mixing(), {}, nothing)


@torch.inference_mode()
def test_bases_take_steps_in_turn() -> None:
    bases = [FrozenBase(tiny_base(architecture)) for architecture in ("llama", "qwen2")]
    ids = torch.arange(3)
    alone = [base.forward(base.embed(ids), ids, Mixing(), {}, ids) for base in bases]
    for _ in range(2):
        for base, expected in zip(bases, alone, strict=True):
            assert torch.equal(base.forward(base.embed(ids), ids, Mixing(), {}, ids), expected)


@for_many_tokens
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_a_token_s_logits_are_the_same_to_the_bit_in_every_company() -> None:
    base = FrozenBase(tiny_base("qwen3"))
    ids, positions = torch.arange(9), torch.arange(9) + 3
    together = base.forward(base.embed(ids), positions, Mixing(), {}, torch.arange(9))
    for start, stop in ((0, 1), (1, 3), (3, 6), (5, 9)):
        part = slice(start, stop)
        logits = base.forward(base.embed(ids[part]), positions[part], Mixing(), {}, torch.arange(stop - start))
        assert torch.equal(logits, together[part])


def _delta(kind: str, site: SiteShape, generator: torch.Generator) -> RowDelta:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    match kind:
        case "low rank":
            return low_rank(numbers(3, site.inputs), numbers(3, site.outputs))
        case "shift":
            return shift(numbers(site.outputs))
        case "output scale":
            return output_scale(numbers(site.outputs) + 1)
        case _:
            return input_scale(numbers(site.inputs) + 1)


def _segment(delta: RowDelta, tokens: slice | Tensor, *, by_kernel: bool = True) -> Segment:
    kernel = KERNELS.of(delta.kind) if by_kernel else None
    return Segment(tokens, delta.kind, _pooled(delta.blocks), is_each=False, kernel=kernel)


def segment_at(base: FrozenBase, site: str, tokens: slice, kind: str = "low rank") -> dict[str, list[list[Segment]]]:
    """A plan with one delta."""
    delta = _delta(kind, base.sites.shapes[site], torch.Generator().manual_seed(4))
    by_kernel = base.sites.shapes[site].kind is SiteKind.LINEAR
    return {site: [[_segment(delta, tokens, by_kernel=by_kernel)]]}


def _pooled(blocks: Sequence[Tensor]) -> tuple[Rows, ...]:
    """Blocks one behind the other in one pool, each from a whole row of its width on."""
    pool = torch.full((sum(block.numel() + block.shape[1] for block in blocks),), torch.nan)
    rows, at = [], 0
    for block in blocks:
        width = block.shape[1]
        first = -(-at // width)
        at = first * width + block.numel()
        pool[at - block.numel() : at] = block.flatten()
        rows.append(Rows(pool[: len(pool) // width * width].view(-1, width), first, len(block)))
    return tuple(rows)


@contextmanager
def _asked(monkeypatch: pytest.MonkeyPatch, *, is_used: bool = True) -> Iterator[list[bool]]:
    """Whether each layer ran by its program; with `is_used` false none does."""
    asked: list[bool] = []
    own = LayerStack.forward

    def forward(stack: LayerStack, *arguments: Any) -> Tensor | None:
        outputs = own(stack, *arguments) if is_used else None
        asked.append(outputs is not None)
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(LayerStack, "forward", forward)
        yield asked


def _compare(base: FrozenBase, plan: SitePlan, monkeypatch: pytest.MonkeyPatch, count: int = 20) -> list[bool]:
    """Logits with a plan by programs are those of the classes' own layers; which layers ran by programs."""
    ids = torch.arange(count) % VOCABULARY

    def logits(plan: SitePlan) -> Tensor:
        return base.forward(base.embed(ids), ids, Mixing(), plan, ids)

    with _asked(monkeypatch) as asked:
        changed = logits(plan)
    with _asked(monkeypatch, is_used=False):
        expected = logits(plan)
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)
    assert float((changed - logits({})).abs().max()) > 0.01
    return asked


def _kinds(product: str) -> list[str]:
    return ["low rank", "shift", "input scale" if product in ("o_proj", "down_proj") else "output scale"]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("tokens", [slice(0, 20), torch.tensor([1, 4, 5, 19])], ids=["all", "some"])
@torch.inference_mode()
def test_row_deltas_are_operations_of_a_layer(
    product: str, tokens: slice | Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = FrozenBase(tiny_base("qwen3"))
    site = next(name for name in base.sites.shapes if name.endswith(f"layers.1.{_module(product)}"))
    for kind in _kinds(product):
        delta = _delta(kind, base.sites.shapes[site], torch.Generator().manual_seed(1))
        assert all(_compare(base, {site: [[_segment(delta, tokens)]]}, monkeypatch))


def _module(product: str) -> str:
    return f"self_attn.{product}" if product[0] in "qkvo" else f"mlp.{product}"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("seed", range(8))
@torch.inference_mode()
def test_stacks_of_adapters_at_any_sites_are_applied_in_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rng = FrozenBase(tiny_base("llama")), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    plan: dict[str, list[list[Segment]]] = {}
    for layer in range(2):
        for product in rng.sample(PRODUCTS, 4):
            site = f"model.layers.{layer}.{_module(product)}"
            scales_input = product in ("o_proj", "down_proj") and rng.random() < 0.5
            kinds = (
                ["input scale"] if scales_input else _kinds(product)[: 2 if product in ("o_proj", "down_proj") else 3]
            )
            plan[site] = [
                [
                    _segment(_delta(rng.choice(kinds), base.sites.shapes[site], generator), tokens)
                    for tokens in rng.sample([slice(0, 7), slice(7, 20)], rng.randint(1, 2))
                ]
                for _ in range(2)
            ]
    assert all(_compare(base, plan, monkeypatch))


@for_many_tokens
@pytest.mark.parametrize(
    ("site", "kind", "by_kernel"),
    [
        ("self_attn.q_proj", "low rank", False),  # many tokens of one adapter, whose matrix products are faster
        ("self_attn.q_proj", "input scale", True),  # keys and values read the same input
        ("mlp.down_proj", "output scale", True),  # of the stream, too
        ("input_layernorm", "output scale", False),
    ],
)
@torch.inference_mode()
def test_a_layer_with_other_deltas_is_left_to_its_class(
    site: str, kind: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = FrozenBase(tiny_base("llama"))
    name = f"model.layers.1.{site}"
    delta = _delta(kind, base.sites.shapes[name], torch.Generator().manual_seed(2))
    plan = {name: [[_segment(delta, slice(3, 9), by_kernel=by_kernel)]]}
    assert _compare(base, plan, monkeypatch) == [True, False]


@for_many_tokens
@torch.inference_mode()
def test_input_and_output_changes_at_one_module_are_left_to_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    base = FrozenBase(tiny_base("llama"))
    site = "model.layers.0.mlp.down_proj"
    generator = torch.Generator().manual_seed(3)
    deltas = [_delta(kind, base.sites.shapes[site], generator) for kind in ("low rank", "input scale")]
    plan = {site: [[_segment(delta, slice(0, 20))] for delta in deltas]}
    assert _compare(base, plan, monkeypatch) == [False, True]


@torch.inference_mode()
def test_a_token_that_is_not_finite_hurts_no_other() -> None:
    base = FrozenBase(tiny_base("llama"))
    every = torch.arange(9)
    embedded = base.embed(every).clone()
    embedded[1] = torch.nan
    logits = base.forward(embedded, every, Mixing(), {}, every)
    assert logits.isfinite().all(-1).tolist() == [index != 1 for index in range(9)]


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
def test_an_activation_without_a_kernel_keeps_the_class_s_own() -> None:
    model = tiny_base("llama")
    layers: Any = model.model.layers
    layers[1].mlp.act_fn = nn.Tanh()
    assert FrozenBase(model).layer_programs == ["model.layers.0"]
