"""The bank: adapters resident on the device, bounded in bytes.

A sequence asks for its stack with a ticket and runs once the ticket is granted; what a granted ticket holds
never leaves, the least recently used of the rest goes first; what adapters share counts once. Loading (read, check,
copy to the device) happens on the loader's threads, so the engine's thread only ever looks.

Tickets are granted in turn: each client's first in the order they came, then each one's second, and so on, so that
nobody's many cold adapters come before all of another's. One that must wait, for its load or for room, lets later
ones whose adapters are resident pass: a cold task never stops the hot ones. That lasts for `PATIENCE` looks; then
nobody behind passes any more, what is held drains, and the wait of the cold ticket has an end.

Everything but the loads runs on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter
from weakref import WeakValueDictionary

from server.adapters.method import Adapter
from server.adapters.pool import RowPool
from server.adapters.resident import Layout, Loaded, Resident
from server.adapters.shared import SharedMatrices
from server.errors import RequestError

logger = logging.getLogger("medley.bank")

PATIENCE = 64  # looks, one per step, that a ticket without room lets others pass
_LOADS = 4  # adapters read but not yet resident, at most: what the bank may use of host memory beside itself

Loader = Callable[[Mapping[str, str]], Adapter]
"""From file names and their blobs' sha256 to the adapter, in host memory."""


@dataclass(frozen=True)
class AdapterKey:
    """An adapter by content."""

    digest: str
    files: Mapping[str, str]  # file name → sha256 of its blob


@dataclass(eq=False)
class Ticket:
    """One sequence's wish for its stack."""

    owner: str
    keys: tuple[AdapterKey, ...]
    client: str = ""  # whose it is
    stack: tuple[Resident, ...] | None = None  # once granted
    error: RequestError | None = None
    refusals: int = field(default=0, repr=False)  # looks that found everything loaded but no room


@dataclass
class _Load:
    future: Future[Loaded]
    started: float
    seconds: float = 0.0
    ended: bool = False  # when the look under way began: all tickets of a look see the same


class Bank:
    """See the module."""

    def __init__(self, capacity: int, pool: RowPool, loader: Loader, wake: Callable[[], None]) -> None:
        """`capacity` in bytes, of which `pool` has as many. `wake` is called from a loader's thread when a load has
        ended."""
        self.capacity = capacity
        self.pool = pool
        self.used = 0
        self.load_seconds: list[float] = []  # of loads that became resident, until somebody takes them
        self._loader = loader
        self._wake = wake
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._layouts: WeakValueDictionary[int, Layout] = WeakValueDictionary()  # by hash, of who is resident
        self._users: Counter[SharedMatrices] = Counter()  # residents that have them
        self._queue: list[Ticket] = []
        self._loads: dict[str, _Load] = {}
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="adapter-load")

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def waiting(self) -> int:
        """Tickets not yet granted."""
        return len(self._queue)

    def request(self, owner: str, keys: Sequence[AdapterKey], client: str = "") -> Ticket:
        """Queue for a stack; `advance` says when it is granted."""
        ticket = Ticket(owner, tuple(keys), client)
        self._queue.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Give a ticket back, granted or not."""
        if ticket.stack is None:
            if ticket in self._queue:
                self._queue.remove(ticket)
            return
        for resident in ticket.stack:
            resident.holders -= 1
        ticket.stack = None

    def advance(self) -> list[Ticket]:
        """Look once: the tickets that are now granted or failed, in their clients' turn."""
        settled: list[Ticket] = []
        for load in self._loads.values():
            load.ended = load.future.done()
        for place, ticket in enumerate(self._in_turn()):
            self._settle(ticket, is_first=place == 0)
            if ticket.stack is not None or ticket.error is not None:
                settled.append(ticket)
            elif ticket.refusals > PATIENCE:
                break
        if settled:
            done = set(map(id, settled))
            self._queue = [ticket for ticket in self._queue if id(ticket) not in done]
        self._forget_unwanted_loads()
        return settled

    def close(self) -> None:
        """Stop the loader's threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _in_turn(self) -> list[Ticket]:
        """What waits: every client's first, every client's second, …; among those in order of arrival."""
        seen: Counter[str] = Counter()
        rounds: list[tuple[int, Ticket]] = []
        for ticket in self._queue:
            rounds.append((seen[ticket.client], ticket))
            seen[ticket.client] += 1
        return [ticket for _, ticket in sorted(rounds, key=itemgetter(0))]

    def _settle(self, ticket: Ticket, *, is_first: bool) -> None:
        keys = {key.digest: key for key in ticket.keys}  # a stack may name the same content twice
        missing = [key for digest, key in keys.items() if digest not in self._residents]
        self._start_loads([key for key in missing if key.digest not in self._loads], is_first)
        arrived = [loaded for key in missing if (loaded := self._arrived(key, ticket)) is not None]
        if ticket.error is not None or len(arrived) < len(missing):
            return
        if not self._make_room(arrived, ticket):
            return
        for key, loaded in zip(missing, arrived, strict=True):
            if not self._place(key.digest, loaded, ticket):
                return
        for key in ticket.keys:
            self._residents.move_to_end(key.digest)
        ticket.stack = tuple(self._residents[key.digest] for key in ticket.keys)
        for resident in ticket.stack:
            resident.holders += 1

    def _arrived(self, key: AdapterKey, ticket: Ticket) -> Loaded | None:
        """The adapter if its load has ended."""
        load = self._loads.get(key.digest)
        if load is None or not load.ended:
            return None
        error = load.future.exception()
        if error is None:
            return load.future.result()
        del self._loads[key.digest]
        if not isinstance(error, RequestError):  # out of memory, say: its own requests fail, nobody else's
            logger.error("an adapter's load failed unexpectedly", exc_info=error)
            error = RequestError("adapter_unavailable", f"the adapter cannot be loaded: {error!r}")
        ticket.error = error
        return None

    def _start_loads(self, keys: list[AdapterKey], is_first: bool) -> None:
        """Load what a ticket lacks: all or nothing, for halves of several stacks could hold all places for ever. The
        first ticket's loads start in any case, however large its stack."""
        if is_first or len(self._loads) + len(keys) <= _LOADS:
            for key in keys:
                self._start(key)

    def _start(self, key: AdapterKey) -> None:
        load = _Load(self._threads.submit(self._load, key.files), time.perf_counter())
        self._loads[key.digest] = load

        def ended(_: Future[Loaded]) -> None:
            load.seconds = time.perf_counter() - load.started
            self._wake()

        load.future.add_done_callback(ended)

    def _load(self, files: Mapping[str, str]) -> Loaded:
        return Loaded.of(self._loader(files), self.pool.device)

    def _place(self, digest: str, loaded: Loaded, ticket: Ticket) -> bool:
        """Write a loaded adapter into the pool; for lack of one free range that is large enough, idle ones go."""
        own = {key.digest for key in ticket.keys}
        first = self.pool.take(loaded.counts)
        while first is None:
            if not self._evict(own):
                if not any(resident.holders for resident in self._residents.values()):
                    while self._evict(set()):  # the ticket's own stand in the way: loaded again, all find room
                        pass
                ticket.refusals += 1
                return False
            first = self.pool.take(loaded.counts)
        loaded.write(self.pool, first)
        self.load_seconds.append(self._loads.pop(digest).seconds)
        layout = self._known(loaded.layout)
        self._residents[digest] = Resident(digest, layout, loaded.counts, first, loaded.bytes, head=loaded.head)
        self.used += self._growth([loaded])
        self._users.update(loaded.layout.shared)
        return True

    def _known(self, layout: Layout) -> Layout:
        """The one object of equal layouts: steps compare them row by row."""
        known = self._layouts.get(hash(layout))
        if known is None or known != layout:
            known = self._layouts[hash(layout)] = layout
        return known

    def _growth(self, arrived: Sequence[Loaded | Resident]) -> int:
        """Bytes that these would add."""
        return _bytes(arrived) - sum(shared.bytes for shared in _shared(arrived) if self._users[shared])

    def _make_room(self, arrived: list[Loaded], ticket: Ticket) -> bool:
        """Evict what nobody holds, least recently used first, until these fit too."""
        own = {key.digest for key in ticket.keys}
        if _bytes([*arrived, *(item for digest, item in self._residents.items() if digest in own)]) > self.capacity:
            ticket.error = RequestError(
                "adapter_too_large",
                f"this request's adapters need more than the server's adapter memory of {self.capacity} bytes",
            )
            return False
        held = (item for item in self._residents.values() if item.holders or item.digest in own)
        if _bytes([*arrived, *held]) > self.capacity:
            ticket.refusals += 1
            return False
        while self.used + self._growth(arrived) > self.capacity:
            self._evict(own)
        return True

    def _evict(self, keep: set[str]) -> bool:
        """Let the least recently used adapter go that nobody holds; False where there is none."""
        for digest, resident in self._residents.items():
            if not resident.holders and digest not in keep:
                del self._residents[digest]
                self.pool.give(resident.first, resident.counts)
                self._users.subtract(resident.layout.shared)
                self.used -= self._growth([resident])
                self._users = +self._users  # without those that nobody has
                return True
        return False

    def _forget_unwanted_loads(self) -> None:
        """Drop ended loads whose tickets are all gone: they would hold their place among the loads for ever."""
        if self._loads:
            wanted = {key.digest for ticket in self._queue for key in ticket.keys}
            for digest in [digest for digest, load in self._loads.items() if load.ended]:
                if digest not in wanted:
                    del self._loads[digest]


def _shared(adapters: Iterable[Loaded | Resident]) -> set[SharedMatrices]:
    return {shared for adapter in adapters for shared in adapter.layout.shared}


def _bytes(adapters: Sequence[Loaded | Resident]) -> int:
    """Of all of them together: what they share counts once."""
    return sum(adapter.bytes for adapter in adapters) + sum(shared.bytes for shared in _shared(adapters))
