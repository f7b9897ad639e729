"""Norms are found by what they compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from server.model import FrozenBase, NormForm, SiteKind
from server.model.norms import find_norms
from tests.reference.bases import tiny_base

WIDTH, EPSILON = 12, 1e-3


class Rms(nn.Module):
    """A root mean square norm; subclasses differ in one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.eps = EPSILON

    def forward(self, hidden: Tensor) -> Tensor:
        return self.scale() * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)

    def scale(self) -> Tensor:
        return self.weight


class OneMore(Rms):
    """Its weight and one."""

    def scale(self) -> Tensor:
        return self.weight + 1


class Half(Rms):
    """Half its weight: another weight changes half as much."""

    def scale(self) -> Tensor:
        return self.weight / 2


class MeanMagnitude(Rms):
    """Divides by something else."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden / (hidden.abs().mean(-1, keepdim=True) + self.eps)


class OtherEpsilon(Rms):
    """Not the epsilon that it names."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 0.5)


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (Rms, NormForm(EPSILON, is_centred=False)),
        (OneMore, NormForm(EPSILON, is_centred=False)),
        (lambda: nn.LayerNorm(WIDTH, EPSILON), NormForm(EPSILON, is_centred=True)),
        (lambda: nn.LayerNorm(WIDTH, EPSILON, bias=False), NormForm(EPSILON, is_centred=True)),
        (Half, None),
        (MeanMagnitude, None),
        (OtherEpsilon, None),
        (lambda: nn.BatchNorm1d(WIDTH), None),
        (lambda: nn.Linear(WIDTH, WIDTH), None),
    ],
)
def test_a_norm_is_known_by_what_another_weight_changes(make: Callable[[], nn.Module], form: NormForm | None) -> None:
    torch.manual_seed(0)
    module = make().eval()
    given = {name: value.clone() for name, value in module.state_dict().items()}
    found = dict(find_norms(nn.ModuleDict({"module": module})))
    assert found == ({} if form is None else {"module": form})
    assert all(torch.equal(module.state_dict()[name], value) for name, value in given.items()), "the base is frozen"


@pytest.mark.parametrize(
    ("architecture", "per_layer"), [("llama", 2), ("gpt2", 2), ("opt", 2), ("gpt_neox", 2), ("gemma", 2), ("qwen3", 4)]
)
def test_every_norm_of_a_base_is_a_site(architecture: str, per_layer: int) -> None:
    base = FrozenBase(tiny_base(architecture))
    norms = {name: site for name, site in base.sites.shapes.items() if site.kind is SiteKind.NORM}
    assert len(norms) == per_layer * len(base.layers) + 1
    assert all(site.inputs == site.outputs == len(base.shape.weight(name)) for name, site in norms.items())
