"""Low-rank updates of runs of tokens against sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.model import RunRows
from server.model.device_deltas import tolerance
from server.model.grouped_products import low_rank_of_runs, worst_run_difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_computes_right_passes_the_trial(dtype: torch.dtype) -> None:
    assert worst_run_difference(dtype, torch.device("cpu")) < tolerance(dtype)


def _swapped(rows: Tensor, factors: Tensor, offs: Tensor) -> Tensor:
    assert own is not None
    return own(rows, factors.flip(0), offs=offs)  # type: ignore[no-any-return]


def _not_finite(rows: Tensor, factors: Tensor, offs: Tensor) -> Tensor:
    assert own is not None
    return own(rows, factors, offs=offs) * torch.nan  # type: ignore[no-any-return]


own = getattr(torch.nn.functional, "grouped_mm", None)
pytestmark = pytest.mark.skipif(own is None, reason="this torch has no grouped products")


@pytest.mark.parametrize("wrong", [_swapped, _not_finite])
def test_the_trial_notices_what_is_wrong(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", wrong)
    assert worst_run_difference(torch.float32, torch.device("cpu")) > 0.1


def test_rows_that_are_zero_fill_up_a_rank() -> None:
    down, up = torch.randn(20, 16), torch.randn(20, 24)
    down[0], up[0] = 0, 0
    index = torch.tensor([[3, 4, 5], [9, 10, 11]])
    ends = torch.tensor([8, 20], dtype=torch.int32)
    inputs, outputs = torch.randn(20, 16), torch.randn(20, 24)
    given = []
    for padding in (0, 5):
        filled = torch.nn.functional.pad(index, (0, padding))
        changed = outputs.clone()
        low_rank_of_runs(inputs, changed, slice(0, 20), (RunRows(down, filled, ends), RunRows(up, filled, ends)))
        given.append(changed)
    torch.testing.assert_close(*given)
    torch.testing.assert_close(given[0][:8], outputs[:8] + inputs[:8] @ down[3:6].T @ up[3:6])
