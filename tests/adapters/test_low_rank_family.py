"""The kinds of delta of LoRA's relatives against one line of mathematics each, and what their readers refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters import Adapter, Checkpoint, read_adapter
from server.adapters.deltas import in_turn, kronecker, low_rank, output_scale, shift
from server.adapters.methods.miss import SummedShards
from server.adapters.methods.vera import Projected
from server.adapters.shared import shared_bytes, shared_matrices
from server.errors import AdapterError
from server.model import BaseShape, LayerShape, RowDelta
from server.model.sites import SiteShape

A, B, C, D = 3, 2, 2, 4  # of a Kronecker product
OUT, IN = A * B, C * D
GROUPS = [(1, 1), (1, 9), (6, 1), (3, 4)]  # groups, tokens of each
Made = tuple[RowDelta, Callable[[Tensor, Tensor], Tensor]]  # the delta; from one token's x and y to the new y


def _shifted() -> Made:
    values = torch.randn(OUT)
    return shift(values), lambda x, y: y + values


def _dora() -> Made:
    """With M for the module under it and b for the base's bias: c ⊙ (Mx + ΔW x) - (c - 1) ⊙ b."""
    down, up, scale, bias = torch.randn(2, IN), torch.randn(OUT, 2), torch.randn(OUT), torch.randn(OUT)
    delta = in_turn(low_rank(down, up.t()), output_scale(scale), shift((1 - scale) * bias))
    return delta, lambda x, y: scale * (y + up @ (down @ x)) - (scale - 1) * bias


def _kronecker() -> Made:
    left, right = torch.randn(A, C), torch.randn(B, D)
    return kronecker(left, right.t()), lambda x, y: y + torch.kron(left, right) @ x


def _factored_kronecker() -> Made:
    left, up, down = torch.randn(A, C), torch.randn(B, 1), torch.randn(1, D)
    return kronecker(left, down.t(), up.t()), lambda x, y: y + torch.kron(left, up @ down) @ x


RANK = 5
DOWN, UP = torch.randn(RANK, IN + 3), torch.randn(OUT + 2, RANK)


def _projected() -> Made:
    inner, outer = torch.randn(RANK), torch.randn(OUT)
    kind = Projected(shared_matrices(DOWN, UP.t(), device=torch.device("cpu")))
    delta = RowDelta(kind, (inner[None], outer[None]))
    return delta, lambda x, y: y + outer * (UP[:OUT] @ (inner * (DOWN[:, :IN] @ x)))


def _summed() -> Made:
    block = torch.randn(3, OUT)
    return RowDelta(SummedShards(3), (block,)), lambda x, y: y + sum(x[i] * block[i % 3] for i in range(IN))


KINDS = [_summed, _shifted, _dora, _kronecker, _factored_kronecker, _projected]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(("groups", "tokens"), GROUPS)
def test_a_kind_is_its_line_of_mathematics(make: Callable[[], Made], groups: int, tokens: int) -> None:
    torch.manual_seed(groups)
    made = [make() for _ in range(groups)]
    inputs, outputs = torch.randn(groups, tokens, IN), torch.randn(groups, tokens, OUT)
    given = inputs.clone()
    expected = torch.stack(
        [
            torch.stack([slow(inputs[group, token], outputs[group, token]) for token in range(tokens)])
            for group, (_, slow) in enumerate(made)
        ]
    )
    assert len({delta.kind for delta, _ in made}) == 1, "adapters of one kind are put together by it"
    blocks = [torch.stack(rows) for rows in zip(*(delta.blocks for delta, _ in made), strict=True)]
    made[0][0].kind.change_output(inputs, outputs, *blocks)
    torch.testing.assert_close(outputs, expected)
    assert torch.equal(inputs, given)


@pytest.mark.parametrize("make", KINDS)
def test_rows_of_zeros_change_no_bit(make: Callable[[], Made]) -> None:
    delta, _ = make()
    inputs, outputs = torch.randn(3, 1, IN), torch.randn(3, 1, OUT)
    given = outputs.clone()
    delta.kind.change_output(inputs, outputs, *(torch.zeros_like(block).expand(3, -1, -1) for block in delta.blocks))
    assert torch.equal(outputs, given)


def test_kinds_over_other_matrices_are_not_equal() -> None:
    device = torch.device("cpu")
    assert Projected(shared_matrices(DOWN, UP, device=device)) == Projected(shared_matrices(DOWN, UP, device=device))
    assert Projected(shared_matrices(DOWN, UP, device=device)) != Projected(shared_matrices(UP, DOWN, device=device))


WEIGHT, BIAS = torch.randn(OUT, IN), torch.randn(OUT)
SHAPE = BaseShape(
    sites={"q": SiteShape(IN, OUT, False), "k": SiteShape(IN, OUT, False)},
    layers=(LayerShape(1, 4),),
    embedding_width=8,
    dtype=torch.float32,
    weight=lambda name: WEIGHT,
    bias=lambda name: BIAS if name in ("q", "k", "norm") else _no_module(name),
)


def _no_module(name: str) -> None:
    raise AttributeError(name)  # as a model says it


LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q"]}
ADALORA: dict[str, Any] = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 3, "target_modules": ["q"]}
VERA: dict[str, Any] = {"peft_type": "VERA", "r": 3, "target_modules": ["q"]}
LOHA: dict[str, Any] = {"peft_type": "LOHA", "r": 2, "alpha": 3, "target_modules": ["q"]}
MISS: dict[str, Any] = {"peft_type": "MISS", "r": 3, "target_modules": ["q"]}
LOKR: dict[str, Any] = {"peft_type": "LOKR", "r": 2, "alpha": 3, "target_modules": ["q"]}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "LORA": {"q.lora_A.weight": (2, IN), "q.lora_B.weight": (OUT, 2)},
    "ADALORA": {"q.lora_A": (3, IN), "q.lora_B": (OUT, 3), "q.lora_E": (3, 1)},
    "VERA": {"q.vera_lambda_d": (3,), "q.vera_lambda_b": (OUT,)},
    "LOHA": {"q.hada_w1_a": (OUT, 2), "q.hada_w1_b": (2, IN), "q.hada_w2_a": (OUT, 2), "q.hada_w2_b": (2, IN)},
    "MISS": {"q.miss_block": (3, OUT)},
    "LOKR": {"q.lokr_w1": (A, C), "q.lokr_w2": (B, D)},
}


def _tensors(config: dict[str, Any], **more: Tensor) -> dict[str, Tensor]:
    tensors = {f"base_model.model.{name}": torch.randn(shape) for name, shape in SHAPES[config["peft_type"]].items()}
    if config["peft_type"] == "VERA" and config.get("save_projection", True):
        tensors |= {"base_model.vera_A": torch.randn(3, IN), "base_model.vera_B": torch.randn(OUT, 3)}
    return tensors | {f"base_model.model.{name.replace('__', '.')}": tensor for name, tensor in more.items()}


def _read(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    room: int | None = None,
) -> Adapter:
    return read_adapter(Checkpoint(config, tensors, dtype, room), replace(SHAPE, dtype=dtype))


def _refused(code: str, config: dict[str, Any], tensors: dict[str, Tensor], says: str, room: int | None = None) -> None:
    with pytest.raises(AdapterError) as caught:
        _read(config, tensors, room=room)
    assert caught.value.code == code, caught.value.message
    assert says in caught.value.message


def _update(adapter: Adapter, site: str = "q") -> Tensor:
    """ΔW, column by column, of a delta that is linear."""
    delta = adapter.deltas[site]
    outputs = torch.zeros(1, IN, OUT)
    delta.kind.change_output(torch.eye(IN)[None], outputs, *(block[None] for block in delta.blocks))
    return outputs[0].t()


@pytest.mark.parametrize("config", [LORA, ADALORA, VERA, LOHA, LOKR, MISS], ids=lambda config: config["peft_type"])
def test_a_tensor_that_is_missing_wrong_or_not_finite_is_named(config: dict[str, Any]) -> None:
    assert _read(config, _tensors(config)).warnings == ()
    for name in _tensors(config):
        tensors = _tensors(config)
        del tensors[name]
        _refused("base_mismatch", config, tensors, says=name.removesuffix("_w1").removesuffix("_w2"))
        _refused("base_mismatch", config, _tensors(config) | {name: torch.randn(3, 3, 3)}, says=name)
        tensors = _tensors(config)
        tensors[name].view(-1)[-1] = torch.nan
        _refused("not_finite", config, tensors, says=name)
        _refused("base_mismatch", config, _tensors(config) | {f"{name}.more": torch.ones(1)}, says=f"{name}.more")


@pytest.mark.parametrize("config", [ADALORA, VERA, LOHA, LOKR, MISS], ids=lambda config: config["peft_type"])
def test_saved_modules_are_refused_by_name(config: dict[str, Any]) -> None:
    _refused("unsupported_method", {**config, "modules_to_save": ["k"]}, _tensors(config), says="modules_to_save")


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (LORA, "bias", "sometimes"),
        (ADALORA, "bias", 3),
        (ADALORA, "init_r", 0),
        (ADALORA, "lora_alpha", 0),
        (ADALORA, "rank_pattern", [1]),
        (ADALORA, "rank_pattern", {"q.lora_E": [True, False]}),
        (ADALORA, "rank_pattern", {"q.lora_E": [1, 0, 1]}),
        (LOHA, "alpha", None),
        (LOHA, "rank_pattern", {"q": 0}),
        (LOKR, "alpha", "x"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_bad_config_and_named(config: dict[str, Any], key: str, value: Any) -> None:
    _refused("bad_config", {**config, key: value}, _tensors(config), says=key)


def test_what_peft_cannot_combine_is_refused() -> None:
    _refused("unsupported_method", {**LORA, "use_dora": True, "lora_bias": True}, _tensors(LORA), says="lora_bias")
    _refused("unsupported_method", {**VERA, "bias": "all"}, _tensors(VERA), says="bias")
    _refused("unsupported_method", {**MISS, "bias": "all"}, _tensors(MISS), says="bias")
    _refused("unsupported_method", {**MISS, "init_weights": "bat"}, _tensors(MISS), says="init_weights")
    mini = {**MISS, "init_weights": "mini", "mini_r": 4}  # does not divide the outputs
    _refused("base_mismatch", mini, {"base_model.model.q.miss_block": torch.ones(3, 4)}, says="mini_r")
    _refused("base_mismatch", {**ADALORA, "rank_pattern": {"k.lora_E": [True] * 3}}, _tensors(ADALORA), says="k.lora_E")


def test_dora_needs_its_magnitudes_and_lora_bias_its_bias() -> None:
    _refused("base_mismatch", {**LORA, "use_dora": True}, _tensors(LORA), says="q.lora_magnitude_vector")
    _refused("base_mismatch", {**LORA, "lora_bias": True}, _tensors(LORA), says="q.lora_B.bias")
    _refused("base_mismatch", LORA, _tensors(LORA, q__lora_B__bias=torch.ones(OUT)), says="q.lora_B.bias")


def test_the_magnitudes_of_a_weight_with_a_row_of_zeros_are_refused() -> None:
    tensors = _tensors(LORA, q__lora_magnitude_vector=torch.ones(OUT))
    tensors["base_model.model.q.lora_B.weight"][1] = 0
    shape = replace(SHAPE, weight=lambda name: torch.zeros(OUT, IN))
    with pytest.raises(AdapterError) as caught:
        read_adapter(Checkpoint({**LORA, "use_dora": True}, tensors, torch.float32), shape)
    assert caught.value.code == "not_finite"


def test_the_norms_of_a_weight_with_many_rows_are_its_rows_own() -> None:
    many = 2500
    weight, down, up, magnitude = torch.randn(many, 2), torch.randn(1, 2), torch.randn(many, 1), torch.rand(many)
    shape = replace(SHAPE, sites={"q": SiteShape(2, many, False)}, weight=lambda name: weight, bias=lambda name: None)
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude}
    checkpoint = Checkpoint(
        {**LORA, "r": 1, "use_dora": True},
        {f"base_model.model.q.{name}": tensor for name, tensor in tensors.items()},
        torch.float32,
    )
    whole = weight + 3 * up @ down
    _, _, change = read_adapter(checkpoint, shape).deltas["q"].blocks
    torch.testing.assert_close(change[0], magnitude / whole.norm(dim=1) - 1)


def test_a_saved_bias_replaces_the_bases() -> None:
    config, saved = {**LORA, "bias": "lora_only"}, torch.randn(OUT)
    _refused("base_mismatch", config, _tensors(config), says="q.base_layer.bias")
    _refused("base_mismatch", LORA, _tensors(LORA, q__base_layer__bias=saved), says="q.base_layer.bias")
    adapter = _read(config, _tensors(config, q__base_layer__bias=saved))
    outputs = BIAS.expand(1, 1, OUT).clone()
    delta = adapter.deltas["q"]
    delta.kind.change_output(torch.zeros(1, 1, IN), outputs, *(block[None] for block in delta.blocks))
    torch.testing.assert_close(outputs[0, 0], saved)
    assert len(_read(config, _tensors(config, q__base_layer__bias=BIAS)).deltas["q"].blocks) == 2, "nothing changed"


def test_all_biases_are_taken_and_those_of_no_site_must_be_the_bases() -> None:
    config = {**LORA, "bias": "all"}
    own = {"q__base_layer__bias": BIAS}
    assert set(_read(config, _tensors(config, **own, k__bias=BIAS + 1)).deltas) == {"q", "k"}
    assert set(_read(config, _tensors(config, **own, k__bias=BIAS, norm__bias=BIAS)).deltas) == {"q"}
    _refused("unsupported_method", config, _tensors(config, **own, norm__bias=BIAS + 1), says="norm.bias")
    _refused("base_mismatch", config, _tensors(config, **own, nothing__bias=BIAS), says="nothing.bias")
    _refused("base_mismatch", config, _tensors(config, **own, k__bias=torch.ones(OUT + 1)), says="k.bias")


def test_a_module_without_rank_left_has_no_delta() -> None:
    config = {**ADALORA, "rank_pattern": {"q.lora_E": [False] * 3}}
    shapes = {"q.lora_A": (0, IN), "q.lora_B": (OUT, 0), "q.lora_E": (0, 1)}
    tensors = {f"base_model.model.{name}": torch.randn(shape) for name, shape in shapes.items()}
    assert _read(config, tensors).deltas == {}


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_loha_is_exact_at_every_rank(rank: int) -> None:
    """As rank² products, or as the update beside an identity."""
    tensors = {
        name: torch.randn(OUT if "_a" in name else rank, rank if "_a" in name else IN) for name in _tensors(LOHA)
    }
    first, second = (
        tensors[f"base_model.model.q.hada_w{n}_a"] @ tensors[f"base_model.model.q.hada_w{n}_b"] for n in (1, 2)
    )
    adapter = _read({**LOHA, "r": rank}, tensors)
    torch.testing.assert_close(_update(adapter), 3 / rank * first * second)
    assert adapter.rank == min(rank**2, IN, OUT)


@pytest.mark.parametrize("config", [LOHA, LOKR], ids=lambda config: config["peft_type"])
def test_a_scaling_that_the_method_does_not_have_is_only_warned_of(config: dict[str, Any]) -> None:
    tensors = _tensors(config)
    other = _read({**config, "use_rslora": True}, tensors)
    torch.testing.assert_close(_update(other), _update(_read(config, tensors)))
    assert [warning.partition(":")[0] for warning in other.warnings] == ["use_rslora"]


@pytest.mark.parametrize("rank", [2, 9])
def test_what_loha_is_expanded_to_must_fit(rank: int) -> None:
    config = {**LOHA, "r": rank}
    tensors = {
        name: torch.randn(OUT if "_a" in name else rank, rank if "_a" in name else IN) for name in _tensors(LOHA)
    }
    whole = _read(config, tensors).bytes
    assert _read(config, tensors, room=whole).bytes == whole
    _refused("too_large", config, tensors, says=f"{whole} bytes", room=whole - 1)


def test_lokr_s_factors_are_compared_with_the_module_before_they_are_multiplied() -> None:
    """Ones that are as long as a file may be would make more than any memory holds."""
    many = 2**22
    tensors = _tensors(LOKR) | {
        "base_model.model.q.lokr_w1_a": torch.zeros(many, 2),
        "base_model.model.q.lokr_w1_b": torch.zeros(2, many),
    }
    tensors.pop("base_model.model.q.lokr_w1", None)
    _refused("base_mismatch", LOKR, tensors, says=f"{many * B}, {many * D}")


def test_lokr_s_factors_that_are_larger_than_their_product_are_not_kept() -> None:
    rank = 40
    up, down, left = torch.randn(B, rank), torch.randn(rank, D), torch.randn(A, C)
    q = "base_model.model.q.lokr"
    adapter = _read({**LOKR, "r": rank}, {f"{q}_w1": left, f"{q}_w2_a": up, f"{q}_w2_b": down})
    assert max(block.shape[1] for block in adapter.blocks) <= max(IN, OUT)
    torch.testing.assert_close(_update(adapter), LOKR["alpha"] / rank * torch.kron(left, up @ down))


@pytest.mark.parametrize("is_saved", [True, False])
def test_vera_s_matrices_must_fit_though_they_are_shared(is_saved: bool) -> None:
    config = {**VERA, "save_projection": is_saved, "projection_prng_key": 3}
    tensors = {name: tensor for name, tensor in _tensors(VERA).items() if is_saved or "lambda" in name}
    adapter = _read(config, tensors)
    matrices = 4 * VERA["r"] * (IN + OUT)
    assert shared_bytes(adapter.deltas.values()) == matrices
    assert shared_bytes([*adapter.deltas.values(), *_read(config, tensors).deltas.values()]) == matrices, "once"
    _read(config, tensors, room=matrices)
    _refused("too_large", config, tensors, says=f"{matrices} bytes", room=matrices - 1)


def test_lokr_s_matrices_must_make_the_modules() -> None:
    _refused("base_mismatch", LOKR, _tensors(LOKR) | {"base_model.model.q.lokr_w2": torch.ones(B, D + 1)}, says="lokr")


def test_vera_without_its_matrices_says_so_and_draws_no_unbounded_ones() -> None:
    config = {**VERA, "save_projection": False, "projection_prng_key": 5}
    first, again = _read(config, _tensors(config)), _read(config, _tensors(config))
    assert first.warnings[0].startswith("save_projection")
    assert first.deltas["q"].kind == again.deltas["q"].kind, "kept once for both"
    assert first.deltas["q"].kind != _read({**config, "projection_prng_key": 6}, _tensors(config)).deltas["q"].kind
    for key in ("x", True, 2**64, 1.5):
        _refused("bad_config", {**config, "projection_prng_key": key}, _tensors(config), says="projection_prng_key")
    wide = {f"base_model.model.q.vera_lambda_{end}": torch.ones(size) for end, size in (("d", 10**6), ("b", OUT))}
    _refused("unsupported_method", {**config, "r": 10**6}, wide, says="save_projection")
