"""Refusals of AdapterHub's fusions and unions: what the library cannot have written, and what is not served."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from server.adapters import Checkpoint, read_adapter
from server.adapters.checkpoint import CONFIG_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, HUB_WEIGHTS_FILE
from server.cli.fused import convert_fusion
from server.errors import AdapterError
from server.model import BaseShape, FrozenBase
from tests.golden.adapterhub.reference import HERE

_FUSION_KEY = "model.layers.1.output_adapters.adapter_fusion_layer.first,second."
_DOWN = "model.layers.1.output_adapters.adapters.second.adapter_down.0.weight"


@pytest.fixture(scope="module")
def shape() -> BaseShape:
    return FrozenBase(AutoModelForCausalLM.from_pretrained(HERE / "base", attn_implementation="eager")).shape


def _opened(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / HUB_WEIGHTS_FILE)


@pytest.fixture
def fusion(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the case `fusion`."""
    convert_fusion(HERE / "cases" / "fusion", tmp_path / "fusion")
    return _opened(tmp_path / "fusion")


@pytest.fixture
def union() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the case `union_ungated`."""
    return _opened(HERE / "cases" / "union_ungated")


def _refused(code: str, says: str, shape: BaseShape, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    files = {CONFIG_FILE: json.dumps(config).encode(), HUB_WEIGHTS_FILE: save(tensors)}
    with pytest.raises(AdapterError) as caught:
        read_adapter(Checkpoint.parse(files, shape.dtype), shape)
    assert caught.value.code == code, caught.value
    assert says in str(caught.value)


def _with(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The config with one value changed, found by dots."""
    changed = deepcopy(config)
    *outer, last = path.split(".")
    inner: Any = changed
    for key in outer:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("code", "says", "path", "value"),
    [
        ("bad_config", "adapter_names", "adapter_names", "first"),
        ("bad_config", "adapter_names", "adapter_names", []),
        ("bad_config", "medley convert", "adapters", None),
        ("bad_config", "first, second", "adapters", {"first": {}}),
        ("unsupported_method", "'second' is no bottleneck", "adapters.second", {"architecture": "lora"}),
        ("unsupported_method", "'second' is no bottleneck", "adapters.second", "pfeiffer"),
        ("unsupported_method", "inv_adapter", "adapters.first.inv_adapter", "nice"),
        ("unsupported_method", "other places", "adapters.second.leave_out", [0]),
        ("unsupported_method", "temperature", "config.temperature", True),
        ("bad_config", "query_before_ln", "config.query_before_ln", "yes"),
        ("base_mismatch", "value.weight", "config.value", False),
        ("base_mismatch", "adapter_fusion_layer.other", "name", "other"),
        ("base_mismatch", "adapter_down", "adapters.second.reduction_factor", 2),
    ],
    ids=str,
)
def test_a_fusion_s_config_that_cannot_be_served_is_refused(
    shape: BaseShape, fusion: tuple[dict[str, Any], dict[str, Tensor]], code: str, says: str, path: str, value: Any
) -> None:
    config, tensors = fusion
    _refused(code, says, shape, _with(config, path, value), tensors)


def test_a_fusion_s_tensors_must_all_be_there_fit_and_be_finite(
    shape: BaseShape, fusion: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    config, tensors = fusion
    key = f"{_FUSION_KEY}key.weight"
    for name in (key, _DOWN):
        _refused("base_mismatch", name, shape, config, {other: tensors[other] for other in tensors if other != name})
        _refused("base_mismatch", name, shape, config, {**tensors, name: torch.ones(3, 3)})
        _refused("not_finite", name, shape, config, {**tensors, name: tensors[name] / 0})
    _refused("base_mismatch", "other", shape, config, {**tensors, "other": torch.ones(1)})
    huge = {key: tensors[key] * 1e25, f"{_FUSION_KEY}query.weight": torch.full((32, 32), 1e25)}  # till multiplied
    _refused("not_finite", _FUSION_KEY.rstrip("."), shape, config, {**tensors, **huge})


def test_a_fusion_may_have_a_head_that_classifies(
    shape: BaseShape, fusion: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    config, tensors = fusion
    described = {"config": {"head_type": "classification", "label2id": {"no": 0, "yes": 1}}, "name": "first,second"}
    files = {
        CONFIG_FILE: json.dumps(config).encode(),
        HUB_WEIGHTS_FILE: save(tensors),
        HEAD_CONFIG_FILE: json.dumps(described).encode(),
        HEAD_WEIGHTS_FILE: save({"heads.first,second.1.weight": torch.ones(2, 32)}),
    }
    adapter = read_adapter(Checkpoint.parse(files, shape.dtype), shape)
    assert adapter.method == "adapter_fusion"
    assert adapter.head is not None
    assert adapter.head.shape.labels == ("no", "yes")


@pytest.mark.parametrize(
    ("code", "says", "path", "value"),
    [
        ("bad_config", "configs", "config.configs", []),
        ("bad_config", "configs", "config.configs", ["lora"]),
        ("unsupported_method", "reft", "config.configs", [{"architecture": "reft"}]),
        ("unsupported_method", "use_gating", "config.configs.0.use_gating", True),
        ("unsupported_method", "use_gating", "config.configs.2.use_gating", True),
        ("bad_config", "leave_out", "config.configs.2.leave_out", "0"),
    ],
    ids=str,
)
def test_a_union_s_config_that_cannot_be_served_is_refused(
    shape: BaseShape, union: tuple[dict[str, Any], dict[str, Tensor]], code: str, says: str, path: str, value: Any
) -> None:
    config, tensors = union
    _refused(code, says, shape, _with(config, path, value), tensors)


@pytest.mark.parametrize(("part", "left"), [(0, "loras"), (1, "prefix"), (2, "output_adapters")])
def test_a_union_without_one_of_its_parts_or_with_one_twice_is_refused(
    shape: BaseShape, union: tuple[dict[str, Any], dict[str, Tensor]], part: int, left: str
) -> None:
    config, tensors = union
    configs = config["config"]["configs"]
    without = configs[:part] + configs[part + 1 :]
    _refused("base_mismatch", left, shape, _with(config, "config.configs", without), tensors)
    _refused("base_mismatch", left, shape, _with(config, "config.configs", [*configs, configs[part]]), tensors)


def test_what_a_union_counts_as_parameters(shape: BaseShape, union: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    """The prefix that the library repeats under every layer counts once."""
    config, tensors = union
    files = {CONFIG_FILE: json.dumps(config).encode(), HUB_WEIGHTS_FILE: save(tensors)}
    adapter = read_adapter(Checkpoint.parse(files, shape.dtype), shape)
    assert (adapter.method, adapter.rank, adapter.virtual_tokens) == ("union", 4, 3)
    once = [tensor.numel() for name, tensor in tensors.items() if ".pool." not in name]
    assert adapter.parameters == sum(once)
