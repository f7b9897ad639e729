"""The fused rotation, and whose place it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.model import Sites, fused


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """The other common convention, under the same name: each dimension is paired with its neighbour."""

    def rotated(heads: Tensor) -> Tensor:
        neighbours = torch.stack([-heads[..., 1::2], heads[..., ::2]], -1).flatten(-2)
        return heads * cos.unsqueeze(unsqueeze_dim) + neighbours * sin.unsqueeze(unsqueeze_dim)

    return rotated(q), rotated(k)


class Attention(nn.Module):
    """As much of an attention module as matters here: it calls its file's function by name."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(8, 8)

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_an_attention_module_that_pairs_dimensions_otherwise_keeps_its_own_forward() -> None:
    model = nn.ModuleDict({"attention": Attention()})
    fused.fuse(model, Sites(model, None))
    assert "forward" not in vars(model["attention"])


def test_the_same_module_over_the_usual_rotation_is_given_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", fused.rotate)
    model = nn.ModuleDict({"attention": Attention()})
    attention = model["attention"]
    query, angles = torch.randn(1, 4, 3, 8), torch.randn(1, 3, 8)
    own = attention(query, query, angles.cos(), angles.sin())
    fused.fuse(model, Sites(model, None))
    assert "forward" in vars(attention)
    for given, expected in zip(attention(query, query, angles.cos(), angles.sin()), own, strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("rotary_width", [8, 4, 2])
def test_the_rotation_turns_each_pair_by_its_angle(rotary_width: int) -> None:
    torch.manual_seed(0)
    angles = torch.randn(1, 3, rotary_width // 2)
    both = torch.cat([angles, angles], -1)
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    given = query.clone()
    rotated = fused.rotate(query, key, both.cos(), both.sin())
    assert torch.equal(query, given)
    for heads, answer in zip((query, key), rotated, strict=True):
        for token in range(3):
            expected = heads[0, :, token].clone()
            for pair in range(rotary_width // 2):
                angle = float(angles[0, token, pair])
                x, y = heads[0, :, token, pair], heads[0, :, token, pair + rotary_width // 2]
                expected[:, pair] = x * math.cos(angle) - y * math.sin(angle)
                expected[:, pair + rotary_width // 2] = y * math.cos(angle) + x * math.sin(angle)
            torch.testing.assert_close(answer[0, :, token], expected)


def test_a_rotation_of_the_last_dimensions_is_another_one() -> None:
    def last(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        width = cos.shape[-1]
        turned = fused.rotate(q[..., -width:], k[..., -width:], cos, sin, unsqueeze_dim)
        return torch.cat([q[..., :-width], turned[0]], -1), torch.cat([k[..., :-width], turned[1]], -1)

    assert not fused._rotates_alike(last, fused.rotate, torch.float32)


def test_a_rotation_that_keeps_the_heads_type_whatever_the_angles_is_another_one_below_float32() -> None:
    def keeping(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        query, key = fused.rotate(q.float(), k.float(), cos.float(), sin.float(), unsqueeze_dim)
        return query.to(q.dtype), key.to(k.dtype)

    assert fused._rotates_alike(keeping, fused.rotate, torch.float32)
    assert not fused._rotates_alike(keeping, fused.rotate, torch.bfloat16)
    assert fused._rotates_alike(fused.rotate, fused.rotate, torch.bfloat16)
