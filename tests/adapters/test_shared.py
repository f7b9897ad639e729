"""Matrices that adapters share: on the device once, counted once, gone with the last who has them."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from server.adapters import Adapter, Bank, RowPool
from server.adapters.deltas import shift
from server.adapters.loads import AdapterKey
from server.adapters.methods.vera import Projected
from server.adapters.shared import SharedMatrices, shared_matrices
from server.adapters.tickets import Ticket
from server.model import RowDelta

CPU = torch.device("cpu")
RANK, WIDTH = 6, 8
OWN = 4 * (RANK + WIDTH)  # bytes of an adapter of one module
SHARED = 4 * 2 * RANK * WIDTH


def _matrices(seed: int) -> SharedMatrices:
    generator = torch.Generator().manual_seed(seed)
    return shared_matrices(*(torch.randn(RANK, WIDTH, generator=generator) for _ in range(2)), device=CPU)


def _load(files: Mapping[str, str]) -> Adapter:
    """`family` names the matrices; without one the adapter shares nothing."""
    if not files["family"]:
        return Adapter("plain", deltas={"q": shift(torch.ones(RANK + WIDTH))})
    blocks = (torch.ones(1, RANK), torch.ones(1, WIDTH))
    return Adapter("vera", deltas={"q": RowDelta(Projected(_matrices(int(files["family"]))), blocks)})


def _bank(capacity: int) -> Bank:
    return Bank(capacity, RowPool(capacity, WIDTH + RANK, dtype=torch.float32, device=CPU), _load, lambda: None)


def _key(name: str, family: str) -> AdapterKey:
    return AdapterKey(name, {"family": family})


def _granted(bank: Bank, *keys: AdapterKey) -> Ticket:
    ticket = bank.request("somebody", keys)
    limit = time.monotonic() + 20
    while ticket not in bank.advance():
        assert time.monotonic() < limit, "never granted"
        time.sleep(0.001)
    return ticket


def test_equal_matrices_are_one_object_and_others_are_not() -> None:
    first = _matrices(1)
    assert _matrices(1) is first
    assert _matrices(2) is not first
    matrix = first.matrices[0]
    assert shared_matrices(matrix.view(WIDTH, RANK), device=CPU) is not shared_matrices(matrix, device=CPU)
    assert shared_matrices(matrix.double(), device=CPU) is not shared_matrices(matrix, device=CPU)


def test_a_matrix_that_is_not_contiguous_is_known_by_its_values() -> None:
    matrix: Tensor = torch.randn(RANK, WIDTH)
    first = shared_matrices(matrix.t(), device=CPU)
    assert shared_matrices(matrix.t().contiguous(), device=CPU) is first
    assert shared_matrices(matrix.view(WIDTH, RANK), device=CPU) is not first


def test_they_are_counted_once_and_go_with_the_last_adapter_that_has_them() -> None:
    bank = _bank(10 * OWN + 2 * SHARED)
    tickets = [_granted(bank, _key(str(number), "1")) for number in range(5)]
    assert bank.used == 5 * OWN + SHARED
    alive = weakref.ref(_matrices(1))
    for ticket in tickets[:4]:
        bank.cancel(ticket)
    other = [_granted(bank, _key(f"other-{number}", "")) for number in range(9)]  # the four make room
    assert bank.used <= bank.capacity
    assert alive() is not None
    for ticket in [*other, tickets[4]]:
        bank.cancel(ticket)
    tickets.clear()
    for number in range(12):
        _granted(bank, _key(f"third-{number}", ""))
    assert bank.used <= bank.capacity
    gc.collect()
    assert alive() is None, "nobody has them, yet they are kept"
    bank.close()


def test_room_is_counted_with_what_is_shared() -> None:
    """What is resident never takes more than the capacity, whoever comes and goes; and everybody is granted."""
    rng = random.Random(4)
    bank = _bank(6 * OWN + 2 * SHARED)
    keys = {
        f"{family}/{number}": _key(f"{family}/{number}", family)
        for family in ("", "1", "2", "3")
        for number in range(4)
    }
    families = {name: name.split("/")[0] for name in keys}
    for _ in range(60):
        names = rng.sample(list(keys), 2)
        ticket = _granted(bank, *(keys[name] for name in names))
        resident = list(bank._residents)  # the slow count: every adapter, and every family once
        slow = len(resident) * OWN + len({families[name] for name in resident} - {""}) * SHARED
        assert bank.used == slow
        assert slow <= bank.capacity
        bank.cancel(ticket)
    bank.close()


def test_an_adapter_whose_matrices_are_larger_than_the_memory_is_refused() -> None:
    bank = _bank(OWN + SHARED - 4)
    ticket = _granted(bank, _key("1", "1"))
    assert ticket.error is not None
    assert ticket.error.code == "adapter_too_large"
    bank.close()
