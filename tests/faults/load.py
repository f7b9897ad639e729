"""Callers that ask again and again while something happens to the servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def load(asks: Sequence[Callable[[], None]]) -> Iterator[list[int]]:
    """Each of the callers asks again and again while the block runs; how often they have. A failure is the block's."""
    ended = threading.Event()
    counts = [0] * len(asks)

    def ask_on(number: int) -> None:
        while not ended.is_set():
            asks[number]()
            counts[number] += 1

    with ThreadPoolExecutor(len(asks)) as pool:
        running = [pool.submit(ask_on, number) for number in range(len(asks))]
        try:
            yield counts
        finally:
            ended.set()
        for caller in running:
            caller.result()
