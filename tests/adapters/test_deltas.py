"""Each kind of row delta against its one line of mathematics, for groups of tokens at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.adapters import Checkpoint, read_adapter
from server.adapters.adapterhub.bottleneck_kind import Flags, Network
from server.adapters.adapterhub.fusion_kind import FusionWeights, fusion
from server.adapters.deltas import input_scale, low_rank, norm_scale, output_scale, token_shift
from server.adapters.methods import sparse
from server.adapters.methods.adaption_prompt import ExtraAttention
from server.adapters.methods.top_layers import Dense
from server.model import BaseShape, LayerShape, NormForm, RowDelta, SiteShape

IN, OUT = 7, 5
GROUPS = [(1, 1), (1, 9), (2, 1), (6, 1), (3, 4)]  # groups, tokens of each


def _blocks(deltas: list[RowDelta]) -> list[Tensor]:
    """`[groups, rows, width]` of each block."""
    return [torch.stack(blocks) for blocks in zip(*(delta.blocks for delta in deltas), strict=True)]


@pytest.mark.parametrize(("groups", "tokens"), GROUPS)
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_low_rank_adds_b_a_x(groups: int, tokens: int, rank: int) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(groups, rank, IN), torch.randn(groups, OUT, rank)
    deltas = [low_rank(A[group], B[group].t()) for group in range(groups)]
    inputs, outputs = torch.randn(groups, tokens, IN), torch.randn(groups, tokens, OUT)
    given = inputs.clone()
    expected = [
        [outputs[g, t] + B[g] @ (A[g] @ inputs[g, t]) for t in range(tokens)] for g in range(groups)
    ]  # fmt: skip
    deltas[0].kind.change_output(inputs, outputs, *_blocks(deltas))
    torch.testing.assert_close(outputs, torch.stack([torch.stack(rows) for rows in expected]))
    assert torch.equal(inputs, given)


@pytest.mark.parametrize(("groups", "tokens"), GROUPS)
def test_an_output_scale_multiplies_the_output(groups: int, tokens: int) -> None:
    torch.manual_seed(0)
    scales, outputs = torch.randn(groups, OUT), torch.randn(groups, tokens, OUT)
    inputs = torch.randn(groups, tokens, IN)
    given = inputs.clone()
    deltas = [output_scale(scale) for scale in scales]
    assert not deltas[0].kind.changes_input
    expected = outputs * scales[:, None]
    deltas[0].kind.change_output(inputs, outputs, *_blocks(deltas))
    torch.testing.assert_close(outputs, expected)
    assert torch.equal(inputs, given)


@pytest.mark.parametrize(("groups", "tokens"), GROUPS)
def test_an_input_scale_multiplies_the_input_and_leaves_the_output(groups: int, tokens: int) -> None:
    torch.manual_seed(0)
    scales, inputs = torch.randn(groups, IN), torch.randn(groups, tokens, IN)
    deltas = [input_scale(scale) for scale in scales]
    assert deltas[0].kind.changes_input
    expected = inputs * scales[:, None]
    deltas[0].kind.change_input(inputs, *_blocks(deltas))
    torch.testing.assert_close(inputs, expected)
    outputs = torch.randn(groups, tokens, OUT)
    given = outputs.clone()
    deltas[0].kind.change_output(inputs, outputs, *_blocks(deltas))
    assert torch.equal(outputs, given)


@pytest.mark.parametrize(
    "delta",
    [lambda: low_rank(torch.ones(2, IN), torch.ones(2, OUT)), lambda: output_scale(torch.ones(OUT))],
    ids=["low_rank", "output_scale"],
)
def test_rows_of_zeros_change_no_bit_of_an_output(delta: Callable[[], RowDelta]) -> None:
    kind, blocks = delta().kind, [torch.zeros_like(block).expand(3, -1, -1) for block in delta().blocks]
    inputs, outputs = torch.randn(3, 1, IN), torch.randn(3, 1, OUT)
    given = outputs.clone()
    kind.change_output(inputs, outputs, *blocks)
    assert torch.equal(outputs, given)


def test_rows_of_zeros_change_no_bit_of_an_input() -> None:
    inputs = torch.randn(3, 1, IN)
    given = inputs.clone()
    input_scale(torch.ones(IN)).kind.change_input(inputs, torch.zeros(3, 1, IN))
    assert torch.equal(inputs, given)


def test_kinds_are_equal_by_value() -> None:
    """Adapters of one kind are put together by it."""
    kinds = [
        {low_rank(torch.ones(rank, IN), torch.ones(rank, OUT)).kind for rank in (1, 3)},
        {output_scale(torch.full((OUT,), value)).kind for value in (1.0, 2.0)},
        {input_scale(torch.full((IN,), value)).kind for value in (1.0, 2.0)},
    ]
    assert [len(same) for same in kinds] == [1, 1, 1]
    assert len(set().union(*kinds)) == len(kinds)


def _network(**flags: object) -> tuple[Flags, Network]:
    """With values in every block."""
    plain = {
        "non_linearity": "swish",
        "is_parallel": False,
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "ln_before": False,
        "ln_after": False,
    }
    known = Flags(**(plain | flags))  # type: ignore[arg-type]
    norms = tuple(torch.randn(OUT) for _ in range(2 * (known.ln_before + known.ln_after)))
    return known, Network(torch.randn(3, OUT), torch.randn(3), torch.randn(3, OUT), torch.randn(OUT), norms)


def _bottleneck(**flags: object) -> RowDelta:
    known, network = _network(**flags)
    return network.delta(known)


def _fusion(**flags: object) -> RowDelta:
    """Of three bottlenecks, the residual through the fusion's matrix too."""
    matrices = [torch.randn(OUT, OUT, dtype=torch.float64) for _ in range(3)]
    weights = FusionWeights(matrices[0], torch.randn(OUT, dtype=torch.float64), *matrices[1:])
    members = [_network(non_linearity="gelu", ln_before=True), _network(non_linearity="sigmoid"), _network(**flags)]
    return fusion(members, weights, query_before_ln=True, residual_before=True)


def _sparse() -> RowDelta:
    site = SiteShape(10, 20, is_head=False)
    tensors = {"m.weight.indices": torch.tensor([[3, 19], [4, 0]]), "m.weight.values": torch.randn(2)}
    shape = BaseShape({"m": site}, (), 6, torch.float32, lambda name: torch.empty(0), lambda name: None)
    return sparse.read(Checkpoint({"medley_method": "sparse"}, tensors, torch.float32), shape).deltas["m"]


def _of_peft(kind: str, tensor: Tensor, **settings: object) -> RowDelta:
    """As a checkpoint of PEFT's with this tensor is read, on a module with 8 inputs and 12 outputs."""
    shape = BaseShape(
        {"m": SiteShape(8, 12, is_head=False)}, (), 6, torch.float32, lambda name: torch.empty(0), lambda name: None
    )
    config = {"peft_type": kind.upper(), "target_modules": ["m"], **settings}
    tensors = {f"base_model.model.m.{name}": tensor for name in _PEFT_NAMES[kind]}
    return read_adapter(Checkpoint(config, tensors, torch.float32), shape).deltas["m"]


_PEFT_NAMES = {"road": ("road_theta", "road_alpha"), "c3a": ("c3a_kernel",), "hra": ("hra_u",)}
_FORM = NormForm(1e-6, is_centred=True)
_EXTRA_ATTENTION = RowDelta(ExtraAttention(LayerShape(2, 3)), (torch.randn(4, 6), torch.randn(4, 6)))
# kinds that act on [groups, tokens, width] of one width, and that width
_KINDS: dict[str, tuple[Callable[[], RowDelta], int, int]] = {
    "norm": (lambda: norm_scale(torch.randn(OUT), _FORM), OUT, OUT),
    "token": (lambda: token_shift(torch.randn(OUT), torch.randn(IN), torch.randn(1)), IN, OUT),
    "sparse": (_sparse, 10, 20),
    "dense": (lambda: RowDelta(Dense(), (torch.randn(OUT, IN),)), IN, OUT),
    "road": (lambda: _of_peft("road", torch.randn(6), variant="road_1", group_size=4), 8, 12),
    "c3a": (lambda: _of_peft("c3a", torch.randn(3, 2, 4), block_size=4), 8, 12),
    "attention": (lambda: _EXTRA_ATTENTION, 12, 12),
    "sequential": (_bottleneck, OUT, OUT),
    "pfeiffer": (lambda: _bottleneck(original_ln_before=True), OUT, OUT),
    "parallel": (lambda: _bottleneck(is_parallel=True), OUT, OUT),
    "stream lost": (lambda: _bottleneck(original_ln_after=False), OUT, OUT),
    "stream twice": (lambda: _bottleneck(original_ln_before=True, residual_before_ln=False), OUT, OUT),
    "norms": (lambda: _bottleneck(ln_before=True, ln_after=True), OUT, OUT),
    "fusion": (_fusion, OUT, OUT),
    "fusion, parallel": (lambda: _fusion(is_parallel=True, original_ln_after=False), OUT, OUT),
    "fusion, stream twice": (lambda: _fusion(original_ln_before=True, residual_before_ln=False), OUT, OUT),
    "residual normed": (lambda: _bottleneck(ln_after=True, adapter_residual_before_ln=True), OUT, OUT),
}


@pytest.mark.parametrize("name", _KINDS)
@torch.inference_mode()
def test_tokens_with_rows_of_their_own_are_changed_as_each_alone(name: str) -> None:
    torch.manual_seed(1)
    make, width, height = _KINDS[name]
    deltas = [make() for _ in range(4)]
    inputs, outputs = torch.randn(4, 1, width), torch.randn(4, 1, height)
    given, before = inputs.clone(), outputs.clone()
    alone = outputs.clone()
    for token, delta in enumerate(deltas):
        delta.kind.change_output(inputs[token][None], alone[token][None], *[block[None] for block in delta.blocks])
    deltas[0].kind.change_output(inputs, outputs, *_blocks(deltas))
    torch.testing.assert_close(outputs, alone)
    assert torch.equal(inputs, given)
    assert not torch.allclose(outputs, before), "the delta changes nothing"


@pytest.mark.parametrize("name", _KINDS)
def test_rows_of_zeros_change_nothing(name: str) -> None:
    make, width, height = _KINDS[name]
    inputs, outputs = torch.randn(3, 1, width), torch.randn(3, 1, height)
    given = outputs.clone()
    delta = make()
    delta.kind.change_output(inputs, outputs, *[torch.zeros_like(block).expand(3, -1, -1) for block in delta.blocks])
    torch.testing.assert_close(outputs, given, rtol=0, atol=0)


def test_a_sparse_update_of_many_tokens_is_applied_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = _sparse()
    inputs, outputs = torch.randn(1, 9, 10), torch.randn(1, 9, 20)
    whole = outputs.clone()
    delta.kind.change_output(inputs, whole, *[block[None] for block in delta.blocks])
    monkeypatch.setattr(sparse, "_VALUES_AT_ONCE", 13)
    delta.kind.change_output(inputs, outputs, *[block[None] for block in delta.blocks])
    assert torch.equal(outputs, whole)


@pytest.mark.parametrize("is_orthogonal", [False, True])
@pytest.mark.parametrize(("groups", "tokens"), GROUPS)
def test_reflections_are_those_of_their_matrices_one_after_another(
    groups: int, tokens: int, is_orthogonal: bool
) -> None:
    torch.manual_seed(3)
    columns = [torch.randn(8, 3) for _ in range(groups)]
    deltas = [_of_peft("hra", part, r=3, apply_GS=is_orthogonal) for part in columns]
    inputs = torch.randn(groups, tokens, 8)
    expected = inputs.clone()
    for group, part in enumerate(columns):
        vectors = torch.linalg.qr(part)[0] if is_orthogonal else part / part.norm(dim=0)
        matrix = torch.eye(8)
        for vector in vectors.t():
            matrix = matrix @ (torch.eye(8) - 2 * torch.outer(vector, vector))
        expected[group] = inputs[group] @ matrix.t()
    deltas[0].kind.change_input(inputs, *_blocks(deltas))
    torch.testing.assert_close(inputs, expected, rtol=1e-4, atol=1e-5)
    given = inputs.clone()
    deltas[0].kind.change_input(inputs, *[torch.zeros_like(block) for block in _blocks(deltas)])
    assert torch.equal(inputs, given)
