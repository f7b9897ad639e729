"""Refusals of the methods that act at norms, attentions and sub-blocks, and of those with weights of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from server.adapters import Adapter, Checkpoint, read_adapter
from server.adapters.checkpoint import CONFIG_FILE, HUB_WEIGHTS_FILE, WEIGHTS_FILE
from server.errors import AdapterError
from server.model import BaseShape, FrozenBase, LayerShape, NormForm, SiteKind, SiteShape
from server.model.blocks import Block
from tests.reference.bases import tiny_base

_ATTENTION = "model.layers.0.self_attn"
_DOWN = "model.layers.0.mlp.down_proj"
_NORM = "model.layers.0.input_layernorm"
_BLOCKS = tuple(Block("model.layers.0", is_attention, _NORM, _DOWN) for is_attention in (True, False))
_WEIGHTS = {f"{_ATTENTION}.{name}": torch.ones(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
_WEIGHTS |= {_DOWN: torch.ones(8, 12), _NORM: torch.ones(8)}
SHAPE = BaseShape(
    sites={
        **{name: SiteShape(8, 8, False) for name in _WEIGHTS if name.startswith(_ATTENTION)},
        _DOWN: SiteShape(12, 8, False),
        _NORM: SiteShape(8, 8, False, SiteKind.NORM, NormForm(1e-6, is_centred=True)),
        _ATTENTION: SiteShape(8, 8, False, SiteKind.ATTENTION),
        **{block.site: SiteShape(8, 8, False, SiteKind.BLOCK) for block in _BLOCKS},
    },
    layers=(LayerShape(2, 4),),
    embedding_width=8,
    dtype=torch.float32,
    weight=_WEIGHTS.__getitem__,
    bias=lambda name: torch.zeros(8) if name == _NORM else None,
    blocks=_BLOCKS,
)

LN = {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}
PROMPT = {"peft_type": "ADAPTION_PROMPT", "target_modules": "self_attn", "adapter_len": 3, "adapter_layers": 1}
NAMED, SPARSE, TOP = ({"medley_method": name} for name in ("named_deltas", "sparse", "top_layers"))
_SETTINGS: dict[str, Any] = {"output_adapter": True, "reduction_factor": 4, "non_linearity": "relu"}


def _hub(**settings: Any) -> dict[str, Any]:
    return {"config": _SETTINGS | settings, "name": "x", "model_type": "llama", "version": "adapters.1.3.0"}


def _tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors that fit."""
    match config.get("peft_type") or config.get("medley_method"):
        case "LN_TUNING":
            key = f"base_model.model.{_NORM}.ln_tuning_layers"
            return {f"{key}.weight": torch.randn(8), f"{key}.bias": torch.randn(8)}
        case "ADAPTION_PROMPT":
            key = f"base_model.model.{_ATTENTION}"
            return {f"{key}.adaption_prompt": torch.randn(1, 3, 8), f"{key}.adaption_gate": torch.randn(1)}
        case "named_deltas":
            return {f"{_DOWN}.bias": torch.randn(8), f"{_NORM}.weight": torch.randn(8)}
        case "sparse":
            return {f"{_DOWN}.weight.indices": torch.tensor([95]), f"{_DOWN}.weight.values": torch.randn(1)}
        case "top_layers":
            return {f"{_DOWN}.weight": torch.randn(8, 12), f"{_NORM}.bias": torch.randn(8)}
        case _:
            key = "model.layers.0.output_adapters.adapters.x"
            down = {f"{key}.adapter_down.0.weight": torch.randn(2, 8), f"{key}.adapter_down.0.bias": torch.randn(2)}
            return down | {f"{key}.adapter_up.weight": torch.randn(8, 2), f"{key}.adapter_up.bias": torch.randn(8)}


def _read(config: dict[str, Any], tensors: dict[str, Tensor], shape: BaseShape = SHAPE) -> Adapter:
    weights = HUB_WEIGHTS_FILE if "config" in config else WEIGHTS_FILE
    files = {CONFIG_FILE: json.dumps(config).encode(), weights: save(tensors)}
    return read_adapter(Checkpoint.parse(files, torch.float32), shape)


def _refused(
    code: str, says: str, config: dict[str, Any], tensors: dict[str, Tensor] | None = None, shape: BaseShape = SHAPE
) -> None:
    with pytest.raises(AdapterError) as caught:
        _read(config, _tensors(config) if tensors is None else tensors, shape)
    assert caught.value.code == code, caught.value.message
    assert says in caught.value.message


CONFIGS = [LN, PROMPT, NAMED, SPARSE, TOP, _hub()]
_roomy = replace(SHAPE, sites=SHAPE.sites | {_DOWN: SiteShape(120, 8, False)})  # 1 % of it is not nothing


def _method(config: dict[str, Any]) -> str:
    return str(config.get("peft_type") or config.get("medley_method") or "bottleneck")


@pytest.mark.parametrize("config", CONFIGS, ids=_method)
def test_what_fits_is_read_and_what_is_left_over_is_named(config: dict[str, Any]) -> None:
    adapter = _read(config, _tensors(config), _roomy if config == SPARSE else SHAPE)
    assert adapter.warnings == ()
    assert adapter.deltas
    shape = _roomy if config == SPARSE else SHAPE
    _refused("base_mismatch", "model.nowhere", config, _tensors(config) | {"model.nowhere.x": torch.randn(1)}, shape)


@pytest.mark.parametrize("config", CONFIGS, ids=_method)
def test_what_is_missing_or_not_finite_is_named(config: dict[str, Any]) -> None:
    shape = _roomy if config == SPARSE else SHAPE
    for name, tensor in _tensors(config).items():
        if tensor.is_floating_point():
            _refused("not_finite", name, config, _tensors(config) | {name: torch.full_like(tensor, torch.nan)}, shape)
            wrong = _tensors(config) | {name: torch.randn(*tensor.shape, 1)}
            _refused("base_mismatch", name, config, wrong, shape)
        if config not in (NAMED, TOP):  # of which any tensor may be left out
            without = {other: value for other, value in _tensors(config).items() if other != name}
            with pytest.raises(AdapterError):
                _read(config, without, shape)


@pytest.mark.parametrize("config", [NAMED, SPARSE, TOP], ids=_method)
def test_an_adapter_that_changes_nothing_is_refused(config: dict[str, Any]) -> None:
    _refused("base_mismatch", "change nothing", config, {})
    if config == TOP:
        _refused("base_mismatch", "change nothing", config, {f"{_DOWN}.weight": torch.ones(8, 12)})


@pytest.mark.parametrize(
    ("code", "says", "indices"),
    [
        ("too_large", "at most 1 %", torch.arange(10)),
        ("base_mismatch", "outside", torch.tensor([960])),
        ("base_mismatch", "outside", torch.tensor([-1])),
        ("base_mismatch", "outside", torch.tensor([[8], [0]])),
        ("base_mismatch", "[2, n]", torch.tensor([[[1]]])),
        ("base_mismatch", "[2, n]", torch.tensor([], dtype=torch.int64)),
        ("bad_config", "int32", torch.tensor([1.0])),
    ],
)
def test_places_of_a_sparse_update_that_are_not_there_are_refused(code: str, says: str, indices: Tensor) -> None:
    tensors = {f"{_DOWN}.weight.indices": indices, f"{_DOWN}.weight.values": torch.randn(indices.numel())}
    _refused(code, says, SPARSE, tensors, _roomy)


def test_norms_are_what_layer_norm_tuning_takes() -> None:
    _refused("base_mismatch", "norm", {**LN, "target_modules": ["down_proj"]})
    _refused("unsupported_method", "modules_to_save", {**LN, "modules_to_save": ["lm_head"]})


def test_an_adaption_prompt_needs_its_projections_and_layers() -> None:
    _refused("base_mismatch", "adapter_layers", {**PROMPT, "adapter_layers": 2})
    _refused("base_mismatch", "attn_of_another", {**PROMPT, "target_modules": "attn_of_another"})
    _refused("bad_config", "target_modules", {**PROMPT, "target_modules": ["self_attn"]})
    fused = {name: site for name, site in SHAPE.sites.items() if not name.endswith("k_proj")}
    _refused("base_mismatch", "k_proj", PROMPT, shape=replace(SHAPE, sites=fused))
    normed = SHAPE.sites | {f"{_ATTENTION}.q_norm": SHAPE.sites[_NORM]}
    _refused("base_mismatch", "alone", PROMPT, shape=replace(SHAPE, sites=normed))
    wide = SHAPE.sites | {_ATTENTION: SiteShape(16, 16, False, SiteKind.ATTENTION)}
    _refused("base_mismatch", "16 wide", PROMPT, shape=replace(SHAPE, sites=wide))


def test_an_adaption_prompt_for_gpt2_needs_its_sub_blocks_and_one_projection_for_all() -> None:
    shape = FrozenBase(tiny_base("gpt2")).shape
    config = {**PROMPT, "target_modules": "attn"}
    name = "transformer.h.1.attn"
    key = f"base_model.model.{name}.adaption_"
    tensors = {f"{key}prompt": torch.randn(1, 3, 32), f"{key}gate": torch.randn(1)}
    assert list(_read(config, tensors, shape).deltas) == ["transformer.h.1.attention result"]
    _refused("base_mismatch", f"{key}gate", config, {f"{key}prompt": tensors[f"{key}prompt"]}, shape)
    _refused("not_finite", f"{key}prompt", config, tensors | {f"{key}gate": torch.tensor([3e38])}, shape)
    _refused("base_mismatch", "GPT-2", config, tensors, replace(shape, blocks=()))
    other = shape.sites | {f"{name}.c_attn": SiteShape(32, 64, False)}
    _refused("base_mismatch", "GPT-2", config, tensors, replace(shape, sites=other))


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("unsupported_method", {"use_gating": True}),
        ("unsupported_method", {"inv_adapter": "nice"}),
        ("unsupported_method", {"cross_adapter": True}),
        ("unsupported_method", {"non_linearity": "prelu"}),
        ("unsupported_method", {"non_linearity": None}),
        ("bad_config", {"is_parallel": "yes"}),
        ("bad_config", {"scaling": "wide"}),
        ("bad_config", {"reduction_factor": 0}),
        ("bad_config", {"reduction_factor": None}),
        ("bad_config", {"reduction_factor": {"1": 2}}),
        ("too_large", {"reduction_factor": 0.5}),
        ("too_large", {"reduction_factor": 1e-9}),
        ("bad_config", {"leave_out": "0"}),
        ("bad_config", {"leave_out": [0]}),
        ("bad_config", {"phm_layer": True, "phm_dim": 3}),
        ("bad_config", {"phm_layer": True, "phm_dim": 4}),
    ],
    ids=str,
)
def test_settings_of_a_bottleneck_that_cannot_be_served_are_named(code: str, settings: dict[str, Any]) -> None:
    _refused(code, next(reversed(settings)), _hub(**settings))


def test_a_base_without_such_sub_blocks_refuses_bottlenecks() -> None:
    _refused("base_mismatch", "bottleneck adapters need", _hub(), shape=replace(SHAPE, blocks=()))
