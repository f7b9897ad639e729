"""Refusals of PEFT's methods for linear modules beside LoRA's family: HRA, C³A, RoAd, SHiRA, BEFT."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from server.adapters import Adapter, Checkpoint, read_adapter
from server.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from server.errors import AdapterError
from server.model import BaseShape, SiteShape

_MODULE = "model.layers.0.mlp.down_proj"
_KEY = f"base_model.model.{_MODULE}."
SHAPE = BaseShape(
    sites={_MODULE: SiteShape(12, 8, False)},
    layers=(),
    embedding_width=8,
    dtype=torch.float32,
    weight=lambda name: torch.ones(8, 12),
    bias=lambda name: None,
)
_TARGET = {"target_modules": ["down_proj"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "HRA": ({"r": 2}, {"hra_u": torch.randn(12, 2)}),
    "C3A": ({"block_size": 4}, {"c3a_kernel": torch.randn(2, 3, 4)}),
    "ROAD": (
        {"variant": "road_2", "group_size": 4},
        {"road_theta": torch.randn(8), "road_alpha": torch.randn(8)},
    ),
    "SHIRA": (
        {"r": 1},
        {"shira_indices": torch.tensor([[0, 7], [11, 3]], dtype=torch.int32), "shira_weight": torch.randn(2)},
    ),
    "BEFT": ({}, {"beft_bias": torch.randn(1, 8)}),
}


def _case(name: str, **settings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = CASES[name]
    full = {"peft_type": name, **_TARGET, **config, **settings}
    return full, {f"{_KEY}{key}": tensor for key, tensor in tensors.items()}


def _read(config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    files = {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(tensors)}
    return read_adapter(Checkpoint.parse(files, torch.float32), SHAPE)


def _refused(code: str, says: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    with pytest.raises(AdapterError) as caught:
        _read(config, tensors)
    assert caught.value.code == code, caught.value
    assert says in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_what_fits_is_read_and_what_does_not_is_named(name: str) -> None:
    config, tensors = _case(name)
    adapter = _read(config, tensors)
    assert adapter.warnings == ()
    assert list(adapter.deltas) == [_MODULE]
    _refused("base_mismatch", "model.nowhere", config, tensors | {"model.nowhere.x": torch.randn(1)})
    for key, tensor in tensors.items():
        _refused("base_mismatch", key, config, {other: tensors[other] for other in tensors if other != key})
        if tensor.is_floating_point():
            _refused("base_mismatch", key, config, tensors | {key: torch.randn(*tensor.shape, 1)})
            _refused("not_finite", key, config, tensors | {key: torch.full_like(tensor, torch.nan)})


@pytest.mark.parametrize("name", CASES)
def test_modules_to_save_and_other_modules_are_refused(name: str) -> None:
    _refused("unsupported_method", "modules_to_save", *_case(name, modules_to_save=["lm_head"]))
    _refused("base_mismatch", "target_modules", *_case(name, target_modules=["nothing"]))


@pytest.mark.parametrize(
    ("name", "code", "says", "settings"),
    [
        ("HRA", "unsupported_method", "bias", {"bias": "all"}),
        ("HRA", "bad_config", "apply_GS", {"apply_GS": "yes"}),
        ("HRA", "bad_config", "r is 0", {"r": 0}),
        ("HRA", "base_mismatch", "r is 13", {"r": 13}),
        ("HRA", "bad_config", "r is too large", {"r": 10**4299}),
        ("C3A", "base_mismatch", "block_size", {"block_size": 5}),
        ("C3A", "bad_config", "block_size", {"block_size": "4"}),
        ("C3A", "base_mismatch", "block_size", {"block_size_pattern": {"down_proj": "4"}}),
        ("C3A", "bad_config", "block_size_pattern", {"block_size_pattern": [4]}),
        ("ROAD", "bad_config", "road_3", {"variant": "road_3"}),
        ("ROAD", "bad_config", "variant", {"variant": ["road_1"]}),
        ("ROAD", "bad_config", "variant", {"variant": {}}),
        ("ROAD", "base_mismatch", "road_theta", {"variant": "road_4"}),
        ("ROAD", "base_mismatch", "group_size", {"group_size": 3}),
        ("ROAD", "base_mismatch", "group_size", {"group_size": 16}),
        ("SHIRA", "unsupported_method", "fan_in_fan_out", {"fan_in_fan_out": True}),
    ],
    ids=str,
)
def test_settings_that_cannot_be_served_are_named(name: str, code: str, says: str, settings: dict[str, Any]) -> None:
    _refused(code, says, *_case(name, **settings))


def test_values_that_are_finite_only_till_something_is_made_of_them_are_refused() -> None:
    config, tensors = _case("HRA")
    _refused("not_finite", "hra_u", config, {key: torch.zeros_like(tensor) for key, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("code", "says", "indices"),
    [
        ("base_mismatch", "outside", torch.tensor([[8, 0], [0, 0]])),
        ("base_mismatch", "outside", torch.tensor([[0, 0], [0, 12]])),
        ("base_mismatch", "outside", torch.tensor([[0, -1], [0, 0]])),
        ("base_mismatch", "[2, n]", torch.tensor([0, 1])),
        ("base_mismatch", "[2, n]", torch.zeros(2, 0, dtype=torch.int64)),
        ("too_large", "a tenth", torch.zeros(2, 10, dtype=torch.int64)),
        ("bad_config", "int32", torch.zeros(2, 2)),
    ],
)
def test_places_that_are_not_there_are_refused(code: str, says: str, indices: Tensor) -> None:
    config, tensors = _case("SHIRA")
    weight = torch.randn(indices.shape[-1])
    changed = {f"{_KEY}shira_indices": indices, f"{_KEY}shira_weight": weight}
    _refused(code, says, config, tensors | changed)


def test_a_method_that_is_not_served_comes_with_the_way_out() -> None:
    config, tensors = _case("BEFT")
    _refused("unsupported_method", "medley convert PATH --to-lora", config | {"peft_type": "OFT"}, tensors)
