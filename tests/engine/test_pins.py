"""Pinned adapters are loaded ahead and never leave; what could never fit beside them is refused; unpinned, they are
ordinary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from server.adapters import Adapter, Bank, RowPool
from server.adapters.deltas import output_scale
from server.adapters.loads import RETRY_SECONDS, AdapterKey
from server.adapters.tickets import Ticket
from server.engine.engine import Engine
from server.errors import RequestError
from server.model import FrozenBase, RowDelta
from tests.harness import Result, collect, folder_ref, greedy, make_engine, request

WIDTH = 4
LOOKS = 500


def _key(name: str) -> AdapterKey:
    return AdapterKey(name, {"name": name})


class World:
    """A bank of so many rows, with adapters of one row per unit of their size; some of them are broken."""

    def __init__(self, rows: int, sizes: dict[str, int]) -> None:
        self.broken: set[str] = set()
        self.loads: list[str] = []
        self.now = 0.0
        capacity = rows * WIDTH * 4
        pool = RowPool(capacity, WIDTH, dtype=torch.float32, device=torch.device("cpu"))

        def load(files: dict[str, str]) -> Adapter:
            name = files["name"]
            self.loads.append(name)
            if name in self.broken:
                raise RequestError("version_corrupt", f"{name} is broken")
            scale = torch.full((WIDTH,), float(ord(name)))
            deltas: dict[str, RowDelta] = {f"site{row}": output_scale(scale + row) for row in range(sizes[name])}
            return Adapter("test", deltas=deltas)

        self.bank = Bank(capacity, pool, load, lambda: None, lambda: self.now)  # type: ignore[arg-type]

    def settle(self, *tickets: Ticket) -> None:
        """Look until these are granted or have failed, and nothing is under way."""
        for _ in range(LOOKS):
            self.bank.advance()
            if all(ticket.stack or ticket.error for ticket in tickets) and not self.bank._loads:
                return
            time.sleep(0.001)
        raise AssertionError([(ticket.owner, ticket.refusals) for ticket in tickets])

    def use(self, name: str) -> Ticket:
        """Ask for one adapter and give it back."""
        ticket = self.bank.request(name, [_key(name)])
        self.settle(ticket)
        self.bank.cancel(ticket)
        return ticket

    def row(self, name: str) -> float:
        """What stands in the pool where an adapter's first row is."""
        resident = self.bank._residents[name]
        return float(self.bank.pool.rows(WIDTH)[resident.first[WIDTH]][0]) + 1

    @property
    def residents(self) -> set[str]:
        return set(self.bank._residents)


@pytest.fixture
def world_of() -> Iterator[Callable[[int, dict[str, int]], World]]:
    worlds: list[World] = []

    def make(rows: int, sizes: dict[str, int]) -> World:
        worlds.append(World(rows, sizes))
        return worlds[-1]

    yield make
    for world in worlds:
        world.bank.close()


WorldOf = Callable[[int, dict[str, int]], World]


def test_what_is_pinned_is_loaded_before_anybody_asks_and_outlives_all_others(world_of: WorldOf) -> None:
    world = world_of(10, dict.fromkeys("pabcdef", 3))
    world.bank.pin([_key("p")])
    world.settle()
    assert world.residents == {"p"}
    assert world.bank.pinned_bytes == world.bank.used == 3 * WIDTH * 4
    for name in "abcdef" * 2:
        world.use(name)
        assert "p" in world.residents
    assert world.loads.count("p") == 1
    assert world.bank.waiting == 0


def test_unpinned_it_is_ordinary_again(world_of: WorldOf) -> None:
    world = world_of(6, dict.fromkeys("pab", 3))
    world.bank.pin([_key("p")])
    world.settle()
    world.bank.pin([])
    assert world.bank.pinned_bytes == 0
    world.use("a")
    world.use("b")
    assert world.residents == {"a", "b"}


def test_a_new_set_of_pins_keeps_what_is_in_both(world_of: WorldOf) -> None:
    world = world_of(9, dict.fromkeys("pqr", 3))
    world.bank.pin([_key("p"), _key("q")])
    world.settle()
    world.bank.pin([_key("q"), _key("r")])
    world.settle()
    world.bank.pin([_key("q"), _key("r")])
    assert sorted(world.loads) == ["p", "q", "r"]
    assert world.bank.pinned_bytes == 6 * WIDTH * 4


def test_what_could_never_fit_beside_the_pinned_ones_is_refused_and_says_so(world_of: WorldOf) -> None:
    world = world_of(10, {"p": 6, "a": 5, "b": 4})
    world.bank.pin([_key("p")])
    world.settle()
    error = world.use("a").error
    assert error is not None
    assert error.code == "adapter_too_large"
    assert "pinned" in error.message
    assert world.use("b").error is None
    world.bank.pin([])
    assert world.use("a").error is None


def test_pins_that_do_not_fit_together_hold_nobody_up(world_of: WorldOf) -> None:
    world = world_of(10, {"p": 6, "q": 6, "a": 4})
    world.bank.pin([_key("p"), _key("q")])
    world.settle()
    assert len(world.residents) == 1
    assert world.use("a").error is None
    assert not world.bank.has_news


def test_pins_between_which_nothing_has_room_move_together_and_stay_as_they_are(world_of: WorldOf) -> None:
    world = world_of(100, {"x": 30, "p": 10, "y": 30, "q": 10, "a": 80})
    for name in "xpyq":
        world.bank.pin([_key(kept) for kept in "pq" if kept in world.residents | {name}])
        world.use(name)
    assert world.residents == set("xpyq")
    before = world.bank._residents["q"]
    place = dict(before.first)
    assert world.use("a").error is None
    assert world.residents == set("pqa")
    after = world.bank._residents["q"]
    assert after.first != place
    assert (after is not before, before.first) == (True, place), "a plan may have been kept by where it was"
    assert [world.row(name) for name in "pqa"] == [ord("p"), ord("q"), ord("a")]
    assert world.loads.count("p") == world.loads.count("q") == 1
    world.bank.pin([])
    assert not any(resident.holders for resident in world.bank._residents.values())


def test_a_broken_adapter_is_read_once_for_all_who_want_it_and_again_only_later(world_of: WorldOf) -> None:
    world = world_of(10, {"a": 1, "b": 1})
    world.broken = {"a"}
    tickets = [world.bank.request(str(index), [_key("a")], client=str(index % 3)) for index in range(7)]
    good = world.bank.request("good", [_key("b")])
    world.settle(*tickets, good)
    assert [ticket.error and ticket.error.code for ticket in tickets] == ["version_corrupt"] * 7
    assert good.stack
    world.now = RETRY_SECONDS - 0.1
    ticket = world.bank.request("again", [_key("b"), _key("a")])
    assert world.bank.advance() == [ticket], "it hears at once"
    assert world.loads.count("a") == 1
    world.now = RETRY_SECONDS + 0.1
    assert world.use("a").error is not None
    assert world.loads.count("a") == 2


def test_a_healed_adapter_need_not_rest(world_of: WorldOf) -> None:
    world = world_of(10, {"a": 1, "b": 1})
    world.broken = {"a", "b"}
    assert world.use("a").error is not None
    assert world.use("b").error is not None
    world.broken.clear()
    world.bank.heal(["a"])  # the blob's name here
    assert world.use("a").error is None
    assert world.use("b").error is not None


def test_a_broken_pin_is_tried_again_once_it_is_healed_or_has_rested(world_of: WorldOf) -> None:
    world = world_of(10, {"p": 1, "q": 1})
    world.broken = {"p", "q"}
    world.bank.pin([_key("p"), _key("q")])
    world.settle()
    for _ in range(20):
        world.bank.advance()
    assert sorted(world.loads) == ["p", "q"]
    world.broken.clear()
    world.bank.heal(["p"])
    world.settle()
    assert world.residents == {"p"}
    world.now = RETRY_SECONDS + 0.1
    world.settle()
    assert world.residents == {"p", "q"}


def test_an_idle_engine_loads_what_is_pinned_and_says_how_much_it_is(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine: Engine = make_engine(base)
    names = ("lora", "ia3", "prompt", "prefix", "lora_patterns", "vera")
    engine.pin([folder_ref(tasks[name]) for name in names])
    engine.step()
    for _ in range(LOOKS):
        if engine.has_work:
            stats = engine.step().stats
            if stats.bank_adapters == len(names):
                break
        time.sleep(0.002)
    assert stats.bank_pinned_bytes == stats.bank_bytes > 0
    assert (stats.waiting, engine.has_work) == (0, False)
    results = {"one": Result()}
    engine.add(request("one", [5], greedy(3), tasks["lora"]))
    collect(engine, results)
    assert len(results["one"].tokens) == 1, "a pinned adapter is there in the first step"
    engine.close()
