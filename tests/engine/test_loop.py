"""The loop sleeps while there is nothing to do, and does what can wait only then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import pytest

from server.engine.engine import Engine
from server.engine.loop import EngineLoop
from server.engine.protocol import Abort, StepOutput

SECONDS = 0.3  # that a loop is watched


class Looked:
    """An engine that counts how often it is looked at."""

    def __init__(self, *, has_work: bool, must_wait: bool) -> None:
        self.looks = self.steps = 0
        self.must_wait = must_wait
        self._has_work = has_work

    @property
    def has_work(self) -> bool:
        """As an engine's."""
        self.looks += 1
        return self._has_work

    def step(self) -> StepOutput:
        """Nothing but a count."""
        self.steps += 1
        return cast(StepOutput, None)

    def abort(self, _: str) -> None:
        """Nothing."""


@contextmanager
def _running(
    engine: Any, *at_rest: Iterator[None], emit: Callable[[Any], None] = lambda _: None
) -> Iterator[EngineLoop]:
    loop = EngineLoop(emit, chain(*at_rest))
    thread = threading.Thread(target=loop.run, args=[cast(Engine, engine)])
    thread.start()
    try:
        yield loop
    finally:
        loop.stop()
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("is_loading", [False, True])
def test_it_sleeps_while_there_is_nothing_to_do_or_all_wait_for_loads(is_loading: bool) -> None:
    engine = Looked(has_work=is_loading, must_wait=is_loading)
    with _running(engine):
        time.sleep(SECONDS)
    assert engine.looks < 20, "it spins"


def test_what_can_wait_is_done_in_pieces_between_which_it_looks_at_what_has_come() -> None:
    may_go_on, began, answered = threading.Event(), threading.Event(), threading.Event()
    done: list[int] = []

    def pieces() -> Iterator[None]:
        for piece in range(3):
            began.set()
            assert may_go_on.wait(10)
            done.append(piece)
            yield

    def emit(_: Any) -> None:
        done_before.append(len(done))
        answered.set()

    done_before: list[int] = []
    with _running(Looked(has_work=False, must_wait=False), pieces(), emit=emit) as loop:
        assert began.wait(10)
        loop.post(Abort(id="nobody's"))
        may_go_on.set()
        assert answered.wait(10)
        time.sleep(SECONDS)
    assert done_before == [1], "it came after the piece under way, before the others"
    assert done == [0, 1, 2]


def test_what_has_come_already_is_done_before_what_can_wait() -> None:
    order: list[str] = []

    def pieces() -> Iterator[None]:
        order.append("piece")
        yield

    loop = EngineLoop(lambda _: order.append("step"), pieces())
    loop.post(Abort(id="nobody's"))
    thread = threading.Thread(target=loop.run, args=[cast(Engine, Looked(has_work=False, must_wait=False))])
    thread.start()
    time.sleep(SECONDS)
    loop.stop()
    thread.join(10)
    assert order == ["step", "piece"]


def test_nothing_that_can_wait_is_done_while_there_is_work() -> None:
    done: list[int] = []

    def pieces() -> Iterator[None]:
        while True:
            done.append(1)
            yield

    engine = Looked(has_work=True, must_wait=False)
    with _running(engine, pieces()):
        time.sleep(SECONDS)
    assert engine.steps
    assert not done
