"""Row deltas in layers that run as programs: operations among the layer's own, or the class's matter."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from server.model import FrozenBase, Segment, SitePlan
from server.model.layer_operations import PRODUCTS
from server.model.layer_programs import LayerStack
from tests.model.mixing import Mixing
from tests.model.packed import for_many_tokens
from tests.model.segments import delta_at, segment_of
from tests.reference.bases import VOCABULARY, tiny_base

pytestmark = pytest.mark.usefixtures("blocked_weights")


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
        delta = delta_at(kind, base.sites.shapes[site], torch.Generator().manual_seed(1))
        assert all(_compare(base, {site: [[segment_of(delta, tokens)]]}, monkeypatch))


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
                    segment_of(delta_at(rng.choice(kinds), base.sites.shapes[site], generator), tokens)
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
    delta = delta_at(kind, base.sites.shapes[name], torch.Generator().manual_seed(2))
    plan = {name: [[segment_of(delta, slice(3, 9), by_kernel=by_kernel)]]}
    assert _compare(base, plan, monkeypatch) == [True, False]


@for_many_tokens
@torch.inference_mode()
def test_input_and_output_changes_at_one_module_are_left_to_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    base = FrozenBase(tiny_base("llama"))
    site = "model.layers.0.mlp.down_proj"
    generator = torch.Generator().manual_seed(3)
    deltas = [delta_at(kind, base.sites.shapes[site], generator) for kind in ("low rank", "input scale")]
    plan = {site: [[segment_of(delta, slice(0, 20))] for delta in deltas]}
    assert _compare(base, plan, monkeypatch) == [False, True]
