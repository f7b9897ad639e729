"""Low-rank updates of many tokens, neighbours of one adapter in runs, without a loop over the adapters.

torch's grouped matrix product multiplies each run with its own factors in one call, so a step's prompts take two of
them at a module, however many tasks they are of. The rows are copied out of the pool for it: for each run, not token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan

import torch
from torch import Tensor
from torch.nn import functional

from server.model.row_deltas import Blocks, RunRows

ALIGNED = 8
"""Widths and ranks are multiples of it: grouped products take rows that begin at multiples of 16 bytes."""


def low_rank_of_runs(inputs: Tensor, outputs: Tensor, tokens: slice | Tensor, blocks: Blocks) -> None:
    """y ← y + Σ (a · x) b, over the rows a and b of the two blocks of a token's run: a `Kernel`, given `RunRows`."""
    down, up = blocks
    assert isinstance(down, RunRows)
    assert isinstance(up, RunRows)
    seen = inputs[tokens].contiguous()
    factors = functional.grouped_mm(seen, down.gather().transpose(1, 2), offs=down.ends)
    changes = functional.grouped_mm(factors, up.gather(), offs=up.ends)
    if isinstance(tokens, slice):
        outputs[tokens] += changes
    else:
        outputs.index_add_(0, tokens, changes)


def worst_run_difference(dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference from sums in float64 on random runs, relative to the largest value; infinite for NaN.

    Raises what torch raises where it has no such product, or none but a loop that asks the device where the runs end.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for lengths in ((8, 40), (9, 8, 63, 17)):
        for inner, outer, rank in ((2048, 144, 8), (72, 136, 64)):
            count = sum(lengths)
            inputs = torch.randn(count + 3, inner, generator=generator).to(device, dtype)
            outputs = torch.randn(count + 3, outer, generator=generator).to(device, dtype)
            pools = [torch.randn(200, width, generator=generator).to(device, dtype) for width in (inner, outer)]
            indices = [torch.randint(0, 200, (len(lengths), rank), generator=generator) for _ in pools]
            ends = torch.tensor(lengths).cumsum(0).int().to(device)
            blocks = tuple(RunRows(pool, index.to(device), ends) for pool, index in zip(pools, indices, strict=True))
            run = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            down, up = (pool.double().cpu()[index][run] for pool, index in zip(pools, indices, strict=True))
            for tokens in (slice(2, 2 + count), torch.arange(2, 2 + count)):
                given = outputs.clone()
                placed = tokens if isinstance(tokens, slice) else tokens.to(device)
                with _never_waiting(device):
                    low_rank_of_runs(inputs, given, placed, blocks)
                expected = outputs.double().cpu()
                expected[tokens] += torch.einsum("tri,ti,tro->to", down, inputs.double().cpu()[tokens], up)
                difference = float((given.double().cpu() - expected).abs().max() / expected.abs().max())
                worst = max(worst, float("inf") if isnan(difference) else difference)
    return worst


@contextmanager
def _never_waiting(device: torch.device) -> Iterator[None]:
    """Inside the block what waits for a device raises `RuntimeError`."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
