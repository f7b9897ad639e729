"""Stacks of several adapters in the bank: none waits for ever for its own parts, or for parts of others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from server.adapters import Adapter, Bank, RowPool
from server.adapters.deltas import output_scale
from server.adapters.loads import AdapterKey
from server.adapters.tickets import Ticket
from server.model import RowDelta

WIDTH = 4
LOOKS = 300


def _adapter(rows: int) -> Adapter:
    deltas: dict[str, RowDelta] = {f"site{row}": output_scale(torch.ones(WIDTH)) for row in range(rows)}
    return Adapter("test", deltas=deltas)


@pytest.fixture
def bank_of() -> Iterator[Callable[[int, dict[str, int]], Bank]]:
    banks: list[Bank] = []

    def make(capacity_rows: int, sizes: dict[str, int]) -> Bank:
        capacity = capacity_rows * WIDTH * 4
        pool = RowPool(capacity, WIDTH, dtype=torch.float32, device=torch.device("cpu"))
        banks.append(Bank(capacity, pool, lambda files: _adapter(sizes[files["name"]]), lambda: None))
        return banks[-1]

    yield make
    for bank in banks:
        bank.close()


def _ask(bank: Bank, *names: str, client: str = "") -> Ticket:
    return bank.request("+".join(names), [AdapterKey(name, {"name": name}) for name in names], client)


def _until_granted(bank: Bank, *tickets: Ticket) -> None:
    for _ in range(LOOKS):
        bank.advance()
        if all(ticket.stack for ticket in tickets):
            return
        time.sleep(0.002)
    raise AssertionError([ticket.refusals for ticket in tickets])


def test_a_stack_that_fits_by_bytes_finds_room_between_its_own_parts(
    bank_of: Callable[[int, dict[str, int]], Bank],
) -> None:
    bank = bank_of(100, {"x": 40, "a": 20, "b": 70})
    for name in ("x", "a"):
        ticket = _ask(bank, name)
        _until_granted(bank, ticket)
        bank.cancel(ticket)
    stack = _ask(bank, "a", "b")
    _until_granted(bank, stack)


def test_a_stack_of_more_adapters_than_load_at_once_is_granted(bank_of: Callable[[int, dict[str, int]], Bank]) -> None:
    names = [f"n{index}" for index in range(7)]
    bank = bank_of(100, dict.fromkeys(names, 2))
    _until_granted(bank, _ask(bank, *names))


def test_parts_of_several_stacks_do_not_hold_all_places(bank_of: Callable[[int, dict[str, int]], Bank]) -> None:
    bank = bank_of(100, dict.fromkeys("abcdefgh", 2))
    tickets = [
        _ask(bank, "a", "b", client="ann"),
        _ask(bank, "c", "d", "e", client="ann"),
        _ask(bank, "f", "g", "h", client="bob"),
    ]
    _until_granted(bank, *tickets)
