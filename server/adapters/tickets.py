"""Tickets: who waits for which adapters, and in whose turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter

from server.adapters.loads import AdapterKey
from server.adapters.resident import Resident
from server.errors import RequestError


@dataclass(eq=False)
class Ticket:
    """One sequence's wish for its stack."""

    owner: str
    keys: tuple[AdapterKey, ...]
    client: str = ""  # whose it is
    stack: tuple[Resident, ...] | None = None  # once granted
    error: RequestError | None = None
    refusals: int = field(default=0, repr=False)  # looks that found everything loaded but no room


def in_turn(tickets: Iterable[Ticket]) -> list[Ticket]:
    """Every client's first, every client's second, …; among those in the order given."""
    seen: Counter[str] = Counter()
    rounds: list[tuple[int, Ticket]] = []
    for ticket in tickets:
        rounds.append((seen[ticket.client], ticket))
        seen[ticket.client] += 1
    return [ticket for _, ticket in sorted(rounds, key=itemgetter(0))]
