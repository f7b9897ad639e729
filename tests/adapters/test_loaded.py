"""From an adapter in host memory to its rows in the pool."""

from __future__ import annotations

import pytest
import torch

from server.adapters import Adapter, EmbeddingPrefix, RowPool
from server.adapters.deltas import low_rank, output_scale
from server.adapters.resident import Loaded


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_reach_the_pool_whole_while_the_device_is_busy(device: str) -> None:
    torch.manual_seed(0)
    target = torch.device(device)
    pool = RowPool(2**26, 512, dtype=torch.float32, device=target)
    busy = torch.randn(512, 512, device=target)
    for _ in range(8):
        rows = torch.randn(4096, 512)
        adapter = Adapter(
            "prompt",
            EmbeddingPrefix(rows),
            {"a": low_rank(torch.randn(3, 512), torch.randn(3, 64)), "b": output_scale(torch.randn(64))},
        )
        busy = busy @ busy / 512
        loaded = Loaded.of(adapter, target)
        first = pool.take(loaded.counts)
        assert first is not None
        loaded.write(pool, first)
        del loaded
        assert torch.equal(pool.rows(512)[first[512] :][:4096].cpu(), rows)
        assert torch.equal(pool.rows(64)[first[64] :][:3].cpu(), adapter.deltas["a"].blocks[1])
        pool.give(first, {512: 4099, 64: 4})


def test_the_rows_of_deltas_are_found_behind_those_of_the_prefix() -> None:
    adapter = Adapter(
        "both",
        EmbeddingPrefix(torch.randn(5, 8)),
        {"a": low_rank(torch.randn(3, 8), torch.randn(3, 4)), "b": output_scale(torch.randn(4))},
    )
    layout = Loaded.of(adapter, torch.device("cpu")).layout
    assert layout.delta_rows == {8: (5, 8), 4: (0, 4)}
