"""Faster forms give what the class's own code gives, and are there; what only looks alike keeps its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.adapters.deltas import input_scale, low_rank, output_scale
from server.model import RowDelta, Rows, Segment, Sites, fused, products
from server.model.layer_kernels import LayerKernels

WIDTH, INNER = 16, 24
_TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# What of a class is known to have a faster form: norms, gated MLPs, rotations, for each of two layers.
FORMS = {
    "llama": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "mistral": (5, 2, 2),
    "gemma": (5, 2, 2),
    "gemma2": (9, 2, 2),
    "gpt_neox": (0, 0, 2),
    "phi3": (5, 0, 2),
}


def _model(architecture: str) -> PreTrainedModel:
    """Random weights, large enough to make every part matter."""
    torch.manual_seed(4)
    config = AutoConfig.for_model(architecture, **_TINY)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def _fuse(model: nn.Module, kernels: LayerKernels | None = None) -> Sites:
    sites = Sites(model, None)
    fused.fuse(model, sites, kernels)
    return sites


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" not in vars(module)


def _forms(model: nn.Module) -> tuple[int, int, int]:
    """How many norms, gated MLPs and rotations are not the class's own."""
    norms = mlps = rotations = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) or _has_own_forward(module):
            continue
        if hasattr(module, "gate_proj"):
            mlps += 1
        elif hasattr(module, "q_proj") or hasattr(module, "qkv_proj") or hasattr(module, "query_key_value"):
            function: Any = getattr(module.forward, "__func__", None)
            rotation = function.__globals__["apply_rotary_pos_emb"]
            rotations += rotation is fused.rotate or isinstance(getattr(rotation, "__self__", None), LayerKernels)
        else:
            norms += 1
    return norms, mlps, rotations


@pytest.mark.parametrize("kernels", [None, LayerKernels()], ids=["torch", "compiled"])
@pytest.mark.parametrize("architecture", FORMS)
@torch.inference_mode()
def test_the_fused_forms_are_in_place_and_the_logits_are_the_classes_own(
    architecture: str, kernels: LayerKernels | None
) -> None:
    model = _model(architecture)
    token_ids = torch.arange(3, 27)[None]
    own = model(token_ids).logits
    assert _forms(model) == (0, 0, 0)
    _fuse(model, kernels)
    assert _forms(model) == FORMS[architecture]
    logits = model(token_ids).logits
    assert float((logits - own).abs().max()) <= 1e-5 * float(own.abs().max())


class Norm(nn.Module):
    """A root mean square norm, as most classes have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


class MeanNorm(Norm):
    """Divides by the mean magnitude."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden / (hidden.abs().mean(-1, keepdim=True) + self.variance_epsilon)


class CentredNorm(Norm):
    """Takes the mean away first."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


class HalfWeightNorm(Norm):
    """Its weight less one half."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * (self.weight + 0.5) / self.weight


class LooseNorm(Norm):
    """The epsilon beside the root, which shows for small inputs only."""

    def forward(self, hidden: Tensor) -> Tensor:
        loose: Tensor = self.weight * hidden / (hidden.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)
        return loose


class GatedNorm(Norm):
    """More than one argument."""

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        hidden = super().forward(hidden)
        return hidden if gate is None else hidden * functional.silu(gate)


class Mlp(nn.Module):
    """A gated MLP with any activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH)
        self.act_fn = activation

    def forward(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return outputs


class AddingMlp(Mlp):
    """Its gate is added."""

    def forward(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) + self.up_proj(hidden))
        return outputs


@pytest.mark.parametrize("make", [Norm, lambda: Mlp(functional.silu)], ids=["norm", "mlp"])
def test_a_module_of_an_unknown_class_is_known_by_what_it_computes(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([make()])
    _fuse(model)
    assert not _has_own_forward(model[0])


@pytest.mark.parametrize(
    "make",
    [
        MeanNorm,
        CentredNorm,
        HalfWeightNorm,
        lambda: nn.LayerNorm(WIDTH),
        lambda: Mlp(torch.tanh),
        lambda: Mlp(torch.sigmoid),
        lambda: Mlp(lambda gate: gate * torch.sigmoid(1.702 * gate)),  # an approximation of GELU that has no fused form
        lambda: AddingMlp(functional.silu),
    ],
    ids=["mean", "centred", "half", "layer", "tanh", "sigmoid", "quick_gelu", "adding"],
)
def test_a_module_that_only_looks_alike_keeps_its_own_forward(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([make()])
    _fuse(model)
    assert _has_own_forward(model[0])


@pytest.mark.parametrize(
    "activation",
    [functional.silu, functional.gelu, lambda x: functional.gelu(x, approximate="tanh"), functional.relu],
    ids=["silu", "gelu", "gelu_tanh", "relu"],
)
@torch.inference_mode()
def test_a_gated_mlp_has_its_own_activation_fused_in(activation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(1)
    mlp = Mlp(activation)
    inputs = torch.linspace(-9, 9, 50 * WIDTH).view(1, 50, WIDTH)
    own = mlp(inputs)
    _fuse(nn.ModuleList([mlp]))
    assert not _has_own_forward(mlp)
    assert float((mlp(inputs) - own).abs().max()) <= 1e-5 * float(own.abs().max())


def _segment(delta: RowDelta, tokens: slice) -> Segment:
    rows = tuple(Rows(block.contiguous(), 0, len(block)) for block in delta.blocks)
    return Segment(tokens, delta.kind, rows, is_each=False)


@pytest.mark.parametrize("count", [1, 2, 3])
@torch.inference_mode()
def test_a_fused_mlp_with_deltas_at_its_products_equals_the_slow_form(count: int) -> None:
    torch.manual_seed(3)
    model, plain = nn.ModuleDict({"mlp": Mlp(functional.silu)}), Mlp(functional.silu)
    mlp = model["mlp"]
    plain.load_state_dict(mlp.state_dict())
    sites = _fuse(model)
    assert not _has_own_forward(mlp)
    A, B = torch.randn(2, WIDTH), torch.randn(INNER, 2)
    out_scale, in_scale = torch.randn(INNER), torch.randn(INNER)
    deltas = {
        "gate_proj": low_rank(A, B.t()),
        "up_proj": output_scale(out_scale),
        "down_proj": input_scale(in_scale),
    }
    inputs = torch.randn(1, 5, WIDTH)
    for names in combinations(deltas, count):
        gate = plain.gate_proj(inputs) + (inputs @ A.t() @ B.t() if "gate_proj" in names else 0)
        up = plain.up_proj(inputs) * (out_scale if "up_proj" in names else 1)
        inner = functional.silu(gate) * up * (in_scale if "down_proj" in names else 1)
        expected = torch.where(torch.arange(5)[:, None] < 3, plain.down_proj(inner), plain(inputs))
        plan = {f"mlp.{name}": [[_segment(deltas[name], slice(0, 3))]] for name in names}
        with sites.applying(plan):
            outputs = mlp(inputs)
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "quick_gelu": lambda inputs: inputs * torch.sigmoid(1.702 * inputs),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _ACTIVATIONS)
@torch.inference_mode()
def test_a_gated_mlp_of_small_weights_keeps_its_activation(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    mlp = Mlp(_ACTIVATIONS[name])
    for parameter in mlp.parameters():
        parameter.normal_(std=0.02)
    mlp = mlp.to(dtype)
    if not products.can_pack(mlp.gate_proj):
        pytest.skip(f"oneDNN has no products in {dtype} on this processor")
    inputs = torch.linspace(-60, 60, 50 * WIDTH).view(1, 50, WIDTH).to(dtype)
    own = mlp(inputs)
    _fuse(nn.ModuleList([mlp]))
    assert _has_own_forward(mlp) == (name in ("tanh", "quick_gelu"))
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((mlp(inputs) - own).abs().max()) <= rounding * float(own.abs().max())


@pytest.mark.parametrize(
    "make",
    [LooseNorm, GatedNorm, lambda: nn.BatchNorm1d(WIDTH).eval(), lambda: nn.GroupNorm(2, WIDTH)],
    ids=["loose", "gated", "batch", "group"],
)
def test_other_norms_keep_their_own_forward(make: Callable[[], nn.Module]) -> None:
    model = nn.ModuleList([make()])
    _fuse(model)
    assert _has_own_forward(model[0])
