"""The bank: adapters resident on the device, bounded in bytes.

A sequence asks for its stack with a ticket and runs once the ticket is granted; what a granted ticket holds
never leaves, the least recently used of the rest goes first; what adapters share counts once. Loading (read, check,
copy to the device) happens on the loader's threads, so the engine's thread only ever looks.

Tickets are granted in turn: each client's first in the order they came, then each one's second, and so on, so that
nobody's many cold adapters come before all of another's. One that must wait, for its load or for room, lets later
ones whose adapters are resident pass: a cold task never stops the hot ones. That lasts for `PATIENCE` looks; then
nobody behind passes any more, what is held drains, and the wait of the cold ticket has an end.

Pinned adapters are loaded ahead and stay: each is held by a ticket of the bank's own. What could never fit beside them
is refused.

Everything but the loads (`loads`) runs on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

from server.adapters.loads import AdapterKey, Loads
from server.adapters.method import Adapter
from server.adapters.pool import RowPool
from server.adapters.resident import Layout, Loaded, Resident
from server.adapters.shared import SharedMatrices
from server.adapters.tickets import Ticket, in_turn
from server.errors import RequestError

logger = logging.getLogger("medley.bank")

PATIENCE = 64  # looks, one per step, that a ticket without room lets others pass
_LOADS = 4  # adapters read but not yet resident, at most: what the bank may use of host memory beside itself
_TOO_LARGE = "adapter_too_large"
_PINS = " pinned"  # the client of the bank's own tickets; no id has a space

Loader = Callable[[Mapping[str, str]], Adapter]
"""From file names and their blobs' sha256 to the adapter, in host memory."""


class Bank:
    """See the module."""

    def __init__(
        self,
        capacity: int,
        pool: RowPool,
        loader: Loader,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`capacity` in bytes, of which `pool` has as many. `wake` is called from a loader's thread when a load has
        ended. `clock` gives seconds, by which failed loads rest."""
        self.capacity = capacity
        self.pool = pool
        self.used = 0
        self.pinned_bytes = 0  # of the pinned adapters that are resident
        self.load_seconds: list[float] = []  # of loads that became resident, until somebody takes them
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._layouts: WeakValueDictionary[int, Layout] = WeakValueDictionary()  # by hash, of who is resident
        self._users: Counter[SharedMatrices] = Counter()  # residents that have them
        self._queue: list[Ticket] = []
        self._pins: dict[str, Ticket] = {}  # by digest; they hold what is pinned, wait for it, or have failed
        self._loads = Loads(lambda files: Loaded.of(loader(files), pool.device), wake, clock)

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def waiting(self) -> int:
        """Requests' tickets not yet granted."""
        return sum(1 for ticket in self._queue if ticket.client != _PINS)

    @property
    def has_news(self) -> bool:
        """Whether `advance` would find a load that has ended."""
        return self._loads.has_ended

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

    def pin(self, keys: Iterable[AdapterKey]) -> None:
        """These, and no others, are to stay resident from now on; those that are not are loaded as soon as may be."""
        wanted = {key.digest: key for key in keys}
        for digest, ticket in list(self._pins.items()):
            if digest not in wanted or ticket.error is not None:
                self.cancel(self._pins.pop(digest))
        for digest, key in wanted.items():
            if digest not in self._pins:
                self._pins[digest] = self.request(digest, [key], _PINS)
        self._count_pinned()

    def heal(self, blobs: Collection[str]) -> None:
        """These blobs are whole again: what failed for them need not rest any longer."""
        self._loads.heal(blobs)

    def advance(self) -> list[Ticket]:
        """Look once: the requests' tickets that are now granted or failed, in their clients' turn."""
        settled: list[Ticket] = []
        self._loads.look()
        self._try_pins_again()
        for place, ticket in enumerate(in_turn(self._queue)):
            self._settle(ticket, is_first=place == 0)
            if ticket.stack is not None or ticket.error is not None:
                settled.append(ticket)
            elif ticket.refusals > PATIENCE:
                break
        if settled:
            done = set(map(id, settled))
            self._queue = [ticket for ticket in self._queue if id(ticket) not in done]
        if self._loads:
            self._loads.forget_all_but({key.digest for ticket in self._queue for key in ticket.keys})
        pins = [ticket for ticket in settled if ticket.client == _PINS]
        if pins:
            self._count_pinned()
            for pin in pins:
                if pin.error is not None:
                    logger.error("adapter %s cannot be pinned: %s", pin.owner, pin.error)
        return [ticket for ticket in settled if ticket.client != _PINS]

    def close(self) -> None:
        """Stop the loader's threads."""
        self._loads.close()

    def _try_pins_again(self) -> None:
        """Queue pins whose load failed and need not rest any longer. One that is too large stays out."""
        for digest, pin in self._pins.items():
            if pin.error is not None and pin.error.code != _TOO_LARGE and self._loads.error(digest) is None:
                pin.error = None
                self._queue.append(pin)

    def _count_pinned(self) -> None:
        self.pinned_bytes = _bytes([item for digest, item in self._residents.items() if self._is_pinned(digest)])

    def _is_pinned(self, digest: str) -> bool:
        """Whether it is resident and stays."""
        pin = self._pins.get(digest)
        return pin is not None and pin.stack is not None

    def _settle(self, ticket: Ticket, *, is_first: bool) -> None:
        keys = {key.digest: key for key in ticket.keys}  # a stack may name the same content twice
        missing = [key for digest, key in keys.items() if digest not in self._residents]
        ticket.error = next((error for key in missing if (error := self._loads.error(key.digest)) is not None), None)
        if ticket.error is not None:
            return
        self._start_loads([key for key in missing if key.digest not in self._loads], is_first)
        arrived = [loaded for key in missing if (loaded := self._loads.arrived(key.digest)) is not None]
        if len(arrived) < len(missing) or (missing and not self._make_room(arrived, ticket)):
            return  # room is a look at all residents: a stack that is there already needs none
        for key, loaded in zip(missing, arrived, strict=True):
            if not self._place(key.digest, loaded, ticket):
                return
        if not keys.keys() <= self._residents.keys():  # the room for one was made at the cost of another
            ticket.error = self._too_large()
            return
        for key in ticket.keys:
            self._residents.move_to_end(key.digest)
        ticket.stack = tuple(self._residents[key.digest] for key in ticket.keys)
        for resident in ticket.stack:
            resident.holders += 1

    def _start_loads(self, keys: list[AdapterKey], is_first: bool) -> None:
        """Load what a ticket lacks: all or nothing, for halves of several stacks could hold all places for ever. The
        first ticket's loads start in any case, however large its stack."""
        if is_first or len(self._loads) + len(keys) <= _LOADS:
            for key in keys:
                self._loads.start(key)

    def _place(self, digest: str, loaded: Loaded, ticket: Ticket) -> bool:
        """Write a loaded adapter into the pool; for lack of one free range that is large enough, idle ones go."""
        own = {key.digest for key in ticket.keys}
        first = self.pool.take(loaded.counts)
        while first is None and self._evict(own):
            first = self.pool.take(loaded.counts)
        if first is None and not any(
            resident.holders > self._is_pinned(known) for known, resident in self._residents.items()
        ):
            self._compact()
            first = self.pool.take(loaded.counts)
            if first is None:
                ticket.error = self._too_large()
                return False
        if first is None:
            ticket.refusals += 1
            return False
        loaded.write(self.pool, first)
        self.load_seconds.append(self._loads.take(digest))
        layout = self._known(loaded.layout)
        self._residents[digest] = Resident(digest, layout, loaded.counts, first, loaded.bytes, head=loaded.head)
        self.used += self._growth([loaded])
        self._users.update(loaded.layout.shared)
        return True

    def _compact(self) -> None:
        """Move all residents together, those of many rows first: no step uses them, and what is free becomes one
        range. Who moves is another resident from then on, for plans of steps may be kept by the old one."""
        rows = {
            digest: {
                width: self.pool.rows(width)[start : start + resident.counts[width]].clone()
                for width, start in resident.first.items()
            }
            for digest, resident in self._residents.items()
        }
        for resident in self._residents.values():
            self.pool.give(resident.first, resident.counts)
        for digest, resident in sorted(self._residents.items(), key=lambda item: -item[1].bytes):
            first = self.pool.take(resident.counts)
            if first is None:  # rows begin at multiples of their width, so another order may need more
                self._drop(digest)
                continue
            self._residents[digest] = moved = replace(resident, first=first)
            if self._is_pinned(digest):
                self._pins[digest].stack = (moved,)
            for width, start in first.items():
                self.pool.rows(width)[start : start + resident.counts[width]] = rows[digest][width]

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
        staying = (item for digest, item in self._residents.items() if digest in own or self._is_pinned(digest))
        if _bytes([*arrived, *staying]) > self.capacity:
            ticket.error = self._too_large()
            return False
        held = (item for item in self._residents.values() if item.holders or item.digest in own)
        if _bytes([*arrived, *held]) > self.capacity:
            ticket.refusals += 1
            return False
        while self.used + self._growth(arrived) > self.capacity:
            self._evict(own)
        return True

    def _too_large(self) -> RequestError:
        beside = f" beside the {self.pinned_bytes} bytes of pinned ones" if self.pinned_bytes else ""
        message = f"these adapters do not fit into the server's adapter memory of {self.capacity} bytes{beside}"
        return RequestError(_TOO_LARGE, message)

    def _evict(self, keep: set[str]) -> bool:
        """Let the least recently used adapter go that nobody holds; False where there is none."""
        for digest, resident in self._residents.items():
            if not resident.holders and digest not in keep:
                self.pool.give(resident.first, resident.counts)
                self._drop(digest)
                return True
        return False

    def _drop(self, digest: str) -> None:
        """Forget a resident whose rows are given back; one that is pinned is loaded again."""
        resident = self._residents.pop(digest)
        self._users.subtract(resident.layout.shared)
        self.used -= self._growth([resident])
        self._users = +self._users  # without those that nobody has
        if self._is_pinned(digest):
            self._pins[digest].stack = None
            self._queue.append(self._pins[digest])
            self._count_pinned()


def _shared(adapters: Iterable[Loaded | Resident]) -> set[SharedMatrices]:
    return {shared for adapter in adapters for shared in adapter.layout.shared}


def _bytes(adapters: Sequence[Loaded | Resident]) -> int:
    """Of all of them together: what they share counts once."""
    return sum(adapter.bytes for adapter in adapters) + sum(shared.bytes for shared in _shared(adapters))
