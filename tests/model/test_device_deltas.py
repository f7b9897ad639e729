"""What a plan's segments turn into for a device's kernels, and the trial that decides whether these are used."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from server.model import DeltaKind, Rows
from server.model.delta_trial import Named, worst_difference
from server.model.device_deltas import DeviceDeltas, Launch, Placed, Tokens, find_device_deltas
from tests.model.slow_deltas import SLOW_LAUNCHES

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SLOW_LAUNCHES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_what_computes_right_passes_the_trial(name: str, dtype: torch.dtype, most: float) -> None:
    assert worst_difference(DeviceDeltas(SLOW_LAUNCHES, CPU), name, dtype, CPU) < most


def _from_the_first_token_on(tokens: Tokens, placed: list[Placed]) -> tuple[Tokens, list[Placed]]:
    return tokens._replace(start=0), placed


def _as_neighbours(tokens: Tokens, placed: list[Placed]) -> tuple[Tokens, list[Placed]]:
    return tokens._replace(chosen=None), placed


def _indices_side_by_side(tokens: Tokens, placed: list[Placed]) -> tuple[Tokens, list[Placed]]:
    def read(rows: Tensor) -> Tensor:
        return rows if 0 in rows.stride() else torch.as_strided(rows, rows.shape, (rows.shape[1], 1))

    return tokens, [Placed(pool, read(rows)) for pool, rows in placed]


def _all_rows_of_the_first_token(tokens: Tokens, placed: list[Placed]) -> tuple[Tokens, list[Placed]]:
    return tokens, [Placed(pool, rows[:1].expand_as(rows)) for pool, rows in placed]


def _without_the_last_row(tokens: Tokens, placed: list[Placed]) -> tuple[Tokens, list[Placed]]:
    return tokens, [Placed(pool, rows[:, : max(1, rows.shape[1] - 1)]) for pool, rows in placed]


@pytest.mark.parametrize(
    "mistake",
    [
        _from_the_first_token_on,
        _as_neighbours,
        _indices_side_by_side,
        _all_rows_of_the_first_token,
        _without_the_last_row,
    ],
)
def test_the_trial_notices_what_is_read_wrongly(mistake: object) -> None:
    assert callable(mistake)

    def launch(inputs: Tensor, outputs: Tensor, tokens: Tokens, *placed: Placed) -> None:
        tokens, changed = mistake(tokens, list(placed))
        SLOW_LAUNCHES["low_rank"](inputs, outputs, tokens, *changed)

    assert worst_difference(DeviceDeltas({"low_rank": launch}, CPU), "low_rank", torch.float32, CPU) > 1e-2


@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_the_trial_notices_a_token_that_is_not_left_alone(value: float) -> None:
    def launch(inputs: Tensor, outputs: Tensor, tokens: Tokens, row: Placed) -> None:
        SLOW_LAUNCHES["shift"](inputs, outputs, tokens, row)
        outputs[-1, 0] += value

    assert worst_difference(DeviceDeltas({"shift": launch}, CPU), "shift", torch.float32, CPU) == float("inf")


def test_what_has_no_kernel_does_not_pass() -> None:
    kernels = DeviceDeltas({"scale": SLOW_LAUNCHES["scale"]}, CPU)
    assert kernels.of(DeltaKind()) is None
    assert kernels.of(Named("shift")) is None
    assert worst_difference(kernels, "shift", torch.float32, CPU) == float("inf")


def test_one_adapters_rows_are_given_as_each_tokens_own() -> None:
    given: list[Placed] = []
    kernels = DeviceDeltas({"low_rank": lambda *call: given.extend(call[3:])}, CPU)
    kernel = kernels.of(Named("low_rank"))
    assert kernel is not None
    memory = torch.arange(4000.0)
    narrow, wide = memory.view(-1, 2), memory.view(-1, 4)
    for rank in (3, 70, 200):  # more rows than it has numbers for as well
        given.clear()
        kernel(torch.zeros(9, 2), torch.zeros(9, 4), slice(2, 5), (Rows(narrow, 7, rank), Rows(wide, 11, rank)))
        for placed, pool, first in zip(given, (narrow, wide), (7, 11), strict=True):
            assert torch.equal(placed.pool[placed.rows], pool[first : first + rank].expand(3, -1, -1))


@pytest.mark.parametrize(
    ("inputs", "outputs", "tokens"),
    [
        (torch.zeros(4, 8), torch.zeros(4, 8), slice(2, 5)),
        (torch.zeros(3, 8), torch.zeros(4, 8), slice(0, 3)),
        (torch.zeros(4, 8), torch.zeros(8, 4).t(), slice(0, 4)),
        (torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.bfloat16), slice(0, 4)),
    ],
    ids=["beyond the rows", "other numbers of rows", "outputs that lie apart", "other types"],
)
def test_what_does_not_fit_is_refused(inputs: Tensor, outputs: Tensor, tokens: slice) -> None:
    kernel = DeviceDeltas(SLOW_LAUNCHES, CPU).of(Named("shift"))
    assert kernel is not None
    with pytest.raises(RuntimeError, match="are no rows of"):
        kernel(inputs, outputs, tokens, (Rows(torch.zeros(9, 8), 1, 1),))


def _fail(*call: object) -> None:
    raise ValueError("no compiler\nfor this")


@pytest.mark.parametrize(
    ("launches", "note"),
    [
        (SLOW_LAUNCHES, "by Triton's kernels"),
        ({**SLOW_LAUNCHES, "scale": SLOW_LAUNCHES["shift"]}, "Triton's kernels are off by"),
        ({**SLOW_LAUNCHES, "scale": _fail}, "Triton's kernels cannot be had: ValueError: no compiler"),
        (None, "Triton is missing"),
    ],
    ids=["right", "wrong", "failing", "missing"],
)
def test_only_kernels_that_were_tried_are_used(
    launches: Mapping[str, Launch] | None, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = None if launches is None else SimpleNamespace(LAUNCHES=launches)
    monkeypatch.setitem(sys.modules, "server.model.triton_deltas", module)
    found, why = find_device_deltas(CPU, torch.float32)
    assert (found is not None) == (launches is SLOW_LAUNCHES)
    assert why.startswith(note)
    assert "\n" not in why


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped products")
@pytest.mark.parametrize("grouped_mm", [None, lambda rows, factors, offs: rows @ factors[0]], ids=["missing", "wrong"])
def test_grouped_products_are_used_only_where_they_are_right(
    grouped_mm: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "server.model.triton_deltas", SimpleNamespace(LAUNCHES=SLOW_LAUNCHES))
    found, why = find_device_deltas(CPU, torch.float32)
    assert found is not None
    assert found.of_runs(Named("low_rank")) is not None
    assert found.of_runs(Named("scale")) is None
    assert why == "by Triton's kernels; long runs by grouped products"
    if grouped_mm is None:
        monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    else:
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    found, why = find_device_deltas(CPU, torch.float32)
    assert found is not None
    assert found.of_runs(Named("low_rank")) is None
    assert "no grouped products" in why


def test_other_types_have_no_kernels() -> None:
    assert find_device_deltas(CPU, torch.float64) == (None, "no kernels for torch.float64")
