"""An adapter that lies in the pool is the adapter that was read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.adapters import Adapter, EmbeddingPrefix, KeyValuePrefix, Resident, RowPool
from server.adapters.deltas import input_scale, low_rank, output_scale
from server.adapters.resident import Layout, Loaded
from server.model import RowDelta

CPU = torch.device("cpu")
HIDDEN, INNER, KEYS = 8, 12, 4


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _prompt(length: int = 3) -> Adapter:
    return Adapter("prompt_tuning", prefix=EmbeddingPrefix(_random(length, HIDDEN)))


def _prefix(length: int = 3, layers: int = 2) -> Adapter:
    blocks = tuple(_random(2 * length, KEYS) for _ in range(layers))
    return Adapter("prefix_tuning", prefix=KeyValuePrefix(length, blocks))


def _ia3(inner: str = "in") -> Adapter:
    scale = input_scale(_random(INNER)) if inner == "in" else output_scale(_random(HIDDEN))
    return Adapter("ia3", deltas={"k": output_scale(_random(KEYS)), "down": scale})


def _lora(rank: int = 2, other: int = 5, sites: tuple[str, str] = ("k", "down")) -> Adapter:
    deltas: dict[str, RowDelta] = {
        sites[0]: low_rank(_random(rank, HIDDEN), _random(KEYS, rank).t()),  # as its method gives it: not contiguous
        sites[1]: low_rank(_random(other, INNER), _random(HIDDEN, other).t()),
    }
    return Adapter("lora", deltas=deltas)


def _both() -> Adapter:
    return Adapter("both", prefix=EmbeddingPrefix(_random(2, HIDDEN)), deltas=_lora().deltas)


ADAPTERS: list[Callable[[], Adapter]] = [_prompt, _prefix, _ia3, _lora, _both]


def _place(pool: RowPool, adapter: Adapter, digest: str) -> Resident:
    """As the bank writes it."""
    loaded = Loaded.of(adapter, CPU)
    assert loaded.bytes == adapter.bytes
    first = pool.take(loaded.counts)
    assert first is not None
    for width, rows in loaded.rows.items():
        pool.rows(width)[first[width] : first[width] + len(rows)] = rows
    return Resident(digest, loaded.layout, loaded.counts, first, loaded.bytes)


def test_every_block_comes_back_as_it_was_whoever_lies_beside_it() -> None:
    torch.manual_seed(0)
    pool = RowPool(1 << 14, INNER, dtype=torch.float32, device=CPU)
    adapters = [make() for make in ADAPTERS for _ in range(3)]
    residents = [_place(pool, adapter, str(index)) for index, adapter in enumerate(adapters)]
    for adapter, resident in zip(adapters, residents, strict=True):
        prefix = resident.layout.prefix
        assert (prefix is None) == (adapter.prefix is None)
        if prefix is not None and adapter.prefix is not None:
            assert prefix.length == adapter.prefix.length
            assert prefix.is_run == isinstance(adapter.prefix, EmbeddingPrefix)
            for block, original in zip(prefix.blocks, adapter.prefix.blocks, strict=True):
                assert torch.equal(resident.block(pool, block), original)
        assert [delta.site for delta in resident.layout.deltas] == list(adapter.deltas)
        for delta in resident.layout.deltas:
            own = adapter.deltas[delta.site]
            assert delta.kind == own.kind
            rows = resident.rows(pool, delta.blocks)
            for block, picked, original in zip(delta.blocks, rows, own.blocks, strict=True):
                assert torch.equal(resident.block(pool, block), original)
                assert torch.equal(picked.gather(), original[None])


@pytest.mark.parametrize("make", ADAPTERS)
def test_adapters_of_one_shape_have_equal_layouts(make: Callable[[], Adapter]) -> None:
    one, other = Loaded.of(make(), CPU).layout, Loaded.of(make(), CPU).layout
    assert one == other
    assert hash(one) == hash(other)


def test_adapters_that_differ_in_kind_shape_or_place_differ_in_layout() -> None:
    adapters = [
        _prompt(),
        _prompt(4),
        _prefix(),
        _prefix(4),
        _prefix(layers=3),
        _ia3(),
        _ia3("out"),
        _lora(),
        _lora(rank=3),
        _lora(other=4),
        _lora(sites=("v", "down")),
        _both(),
        Adapter("scale", deltas={"q": output_scale(_random(HIDDEN))}),
        Adapter("scale", deltas={"q": input_scale(_random(HIDDEN))}),  # the same widths, another kind
    ]
    layouts: list[Layout] = [Loaded.of(adapter, CPU).layout for adapter in adapters]
    assert len(set(layouts)) == len(layouts)
