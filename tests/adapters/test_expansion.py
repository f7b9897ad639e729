"""A small file that stands for much memory: what is made of it is held against the adapter memory before it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from server.adapters import Adapter, Checkpoint, read_adapter
from server.errors import AdapterError
from server.model import FrozenBase

_GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub"
_HIDDEN, _LAYERS = 32, 3  # of the golden base, whose keys and values are 16 wide
_Q = "base_model.model.model.layers.0.self_attn.q_proj.lokr"


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return FrozenBase(AutoModelForCausalLM.from_pretrained(_GOLDEN / "base", attn_implementation="eager"))


def _read(config: dict[str, Any], tensors: dict[str, Tensor], base: FrozenBase, room: int | None = None) -> Adapter:
    return read_adapter(Checkpoint(config, tensors, base.dtype, room), base.shape)


def _case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An AdapterHub file's config and tensors."""
    folder = _GOLDEN / "cases" / name
    return Checkpoint.open(folder, torch.float32).config, load_file(folder / "adapter.safetensors")


def _lokr() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A whole matrix out of two vectors."""
    config = {"peft_type": "LOKR", "r": 1, "alpha": 1, "target_modules": ["layers.0.self_attn.q_proj"]}
    tensors = {f"{_Q}_w1_a": torch.ones(_HIDDEN, 1), f"{_Q}_w1_b": torch.ones(1, _HIDDEN), f"{_Q}_w2": torch.ones(1, 1)}
    return config, tensors


@pytest.mark.parametrize(
    ("case", "makes", "values"),
    [
        ("prefix", "server.adapters.adapterhub.prefix._project", 5 * _LAYERS * 2 * 16),
        ("compacter", "torch.kron", _LAYERS * 2 * 2 * _HIDDEN * 8),
        ("compacter_shared_W", "torch.kron", _LAYERS * 2 * _HIDDEN * 8),
        ("vera", "server.adapters.adapterhub.low_rank.low_rank", _LAYERS * 4 * 2 * _HIDDEN),
        ("lokr", "server.adapters.methods.lokr._product", _HIDDEN**2),
    ],
)
def test_what_is_made_must_fit_before_it_is_made(
    base: FrozenBase, monkeypatch: pytest.MonkeyPatch, case: str, makes: str, values: int
) -> None:
    config, tensors = _lokr() if case == "lokr" else _case(case)
    assert _read(config, dict(tensors), base, room=4 * values).bytes >= 4 * values

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("made before it was known to fit")

    monkeypatch.setattr(makes, forbidden)
    with pytest.raises(AdapterError, match="bytes resident") as caught:
        _read(config, tensors, base, room=4)
    assert caught.value.code == "too_large"
    monkeypatch.undo()
    with pytest.raises(AdapterError, match=f"{4 * values} bytes resident"):
        _read(config, tensors, base, room=4 * values - 1)


def test_all_parts_of_a_file_share_the_room() -> None:
    checkpoint = Checkpoint({}, {}, torch.float32, room=8)
    checkpoint.part({}).expand("first", 1)
    checkpoint.part({}).expand("second", 1)
    with pytest.raises(AdapterError, match="12 bytes resident"):
        checkpoint.part({}).expand("third", 1)


def test_a_compacter_s_rule_has_a_bound(base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows with the number of terms to the third, out of factors that grow to the second."""
    monkeypatch.setattr("server.adapters.adapterhub.bottleneck.MOST_TERMS", 3)
    with pytest.raises(AdapterError, match="phm_dim is 4; at most 3") as caught:
        _read(*_case("compacter"), base)
    assert caught.value.code == "too_large"
