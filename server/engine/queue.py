"""The waiting queue: which sequence starts next; fair between clients, strict between priorities. No torch.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024), one per client and
priority. A counter is charged for what the client is served: 1 for each prompt position that is run for it, 2 for
each token generated; what comes from a cache is free, and what a preemption makes run again was paid before. Of the
clients that wait, the one with the least counter starts its oldest sequence. A client that comes to an empty place
in the queue is lifted to the least counter there (or, if nobody waits, to that of the client who started last), so
that idle time earns nothing; a client that left with more than that still has to wait for the others.

The priorities are served in order, 0 first; each has counters of its own. But nobody starves, by low priority or by
ever new clients with small counters: a client that has waited in its priority while `PATIENCE` sequences of others
started goes next, the longest wait first. Preempted sequences stand before all: they had their turn already.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from server.engine.sequence import Sequence

OUTPUT_WEIGHT = 2  # of a generated token, beside 1 for a prompt position: the paper's weights
PATIENCE = 256  # starts of others; with more clients than this the turns go round by the request, not by the token
_MAX_DEBTS = 1024  # clients that left in debt and are remembered, in each priority; the oldest are forgiven


@dataclass
class _Share:
    """One client within one priority."""

    counter: int
    num_open: int = 0  # its sequences that wait or run
    waiting: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)  # in order of arrival
    since: int = 0  # the queue's count of starts when it began to wait, or when one of its own started last


class _Level:
    """The clients of one priority. Those with nothing open are forgotten, but for a bounded number of debts."""

    def __init__(self) -> None:
        self.shares: dict[str, _Share] = {}
        self._debts: OrderedDict[str, int] = OrderedDict()
        self._last = _Share(0)  # whose sequence started last

    @property
    def waiting(self) -> Iterator[_Share]:
        """Clients that have something waiting."""
        return (share for share in self.shares.values() if share.waiting)

    def add(self, sequence: Sequence, starts: int) -> None:
        client = sequence.request.client
        share = self.shares.get(client)
        if share is None:
            share = _Share(self._debts.pop(client, 0))
        if not share.waiting:
            least = min((other.counter for other in self.waiting), default=self._last.counter)
            share.counter = max(share.counter, least)
            share.since = starts
        share.num_open += 1
        share.waiting[sequence] = None
        self.shares[client] = share

    def start(self, sequence: Sequence, starts: int) -> None:
        share = self.shares[sequence.request.client]
        del share.waiting[sequence]
        share.since = starts
        self._last = share

    def end(self, sequence: Sequence) -> None:
        """One that waited or ran is gone."""
        client = sequence.request.client
        share = self.shares[client]
        share.waiting.pop(sequence, None)
        share.num_open -= 1
        if share.num_open:
            return
        del self.shares[client]
        self._debts[client] = share.counter
        if len(self._debts) > _MAX_DEBTS:
            self._debts.popitem(last=False)
        if not self.shares:  # nobody is left to whom anything is owed
            self._debts.clear()
            self._last = _Share(0)


class WaitingQueue:
    """See the module. It iterates over what waits; it also hears of what runs, which is what counters count."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._preempted: deque[Sequence] = deque()
        self._length = 0
        self._starts = 0
        self._chosen: Sequence | None = None
        self._chosen_rank = 0  # the priority that it was chosen with

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for priority in sorted(self._levels):
            for share in self._levels[priority].waiting:
                yield from share.waiting

    def __contains__(self, sequence: object) -> bool:
        if not isinstance(sequence, Sequence):
            return False
        return sequence in self._preempted or self._is_queued(sequence)

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        self._levels.setdefault(sequence.request.priority, _Level()).add(sequence, self._starts)
        self._length += 1

    def put_back(self, sequence: Sequence) -> None:
        """One that ran was preempted: it stands before all others."""
        self._preempted.appendleft(sequence)
        self._length += 1

    def head(self) -> Sequence:
        """The one that starts next; the queue is not empty.

        It stays the next until it starts, whatever is charged meanwhile, unless one of a higher priority comes: two
        whose prefixes do not fit side by side must not push each other out for ever.
        """
        if self._preempted:
            return self._preempted[0]
        best = min(priority for priority, level in self._levels.items() if any(level.waiting))
        if self._chosen is None or best < self._chosen_rank:
            self._chosen, self._chosen_rank = self._choose(best)
        return self._chosen

    def start(self, sequence: Sequence) -> None:
        """The head runs."""
        assert sequence is self.head(), "sequences start in the queue's order"
        self._length -= 1
        if self._preempted:
            self._preempted.popleft()
            return
        self._starts += 1
        self._level(sequence).start(sequence, self._starts)
        self._chosen = None

    def end(self, sequence: Sequence) -> None:
        """One that waits or runs is gone."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            self._length -= 1
        elif self._is_queued(sequence):
            self._length -= 1
        if sequence is self._chosen:
            self._chosen = None
        self._level(sequence).end(sequence)

    def charge_prefix(self, sequence: Sequence, count: int) -> None:
        """`count` positions of a shared prefix run because of this sequence, which waits for them."""
        self._charge(sequence, count)

    def charge(self, sequence: Sequence, start: int, stop: int) -> None:
        """A sequence's positions `start` … `stop` - 1 run in this step."""
        first = max(start, sequence.num_charged)
        if stop <= first:  # run again after a preemption
            return
        cost = max(min(stop, sequence.num_prompt) - first, 0)
        if stop == sequence.num_tokens and sequence.sampling.max_tokens:  # the last one gives the next token
            cost += OUTPUT_WEIGHT
        sequence.num_charged = stop
        self._charge(sequence, cost)

    def _charge(self, sequence: Sequence, cost: int) -> None:
        self._level(sequence).shares[sequence.request.client].counter += cost

    def _choose(self, best: int) -> tuple[Sequence, int]:
        """Whoever has waited too long, else the least counter of the `best` priority; and with which priority."""
        shares = [share for level in self._levels.values() for share in level.waiting]
        longest = min(shares, key=lambda share: share.since)
        if self._starts - longest.since >= PATIENCE:
            return next(iter(longest.waiting)), 0
        least = min(self._levels[best].waiting, key=lambda share: (share.counter, share.since))
        return next(iter(least.waiting)), best

    def _level(self, sequence: Sequence) -> _Level:
        return self._levels[sequence.request.priority]

    def _is_queued(self, sequence: Sequence) -> bool:
        level = self._levels.get(sequence.request.priority)
        share = level.shares.get(sequence.request.client) if level is not None else None
        return share is not None and sequence in share.waiting


def who_makes_room(client: str, held: Mapping[str, int], waiting: Iterable[Sequence]) -> Sequence | None:
    """Whom to end so that `client` may have one more in a full queue; None: nobody, the newcomer is refused.

    `held` counts each client's sequences, waiting or running; `waiting` is in order of arrival. Room is made by the
    client that holds the most and still holds no less than the newcomer's afterwards: its newest sequence that has
    not begun. So a queue that stays full comes to be shared equally.
    """
    least = held.get(client, 0) + 2
    if max(held.values(), default=0) < least:  # a flood's refusals must cost little
        return None
    newest: dict[str, Sequence] = {}
    for sequence in waiting:
        if held[sequence.request.client] >= least and not sequence.num_charged:
            newest[sequence.request.client] = sequence
    return max(newest.values(), key=lambda sequence: held[sequence.request.client], default=None)
