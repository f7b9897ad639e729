"""Packing: the rows of a step one behind the other, and where each one's tokens and logits lie.

Rows of one stack stand beside each other, and those of like layout, so that the tokens of an adapter, and of all
adapters of one layout, are neighbours where that is possible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from server.adapters import Resident
from server.engine.prefixes import PrefixRun
from server.engine.scheduler import Row, Schedule
from server.engine.sequence import Sequence

# From so many tokens on an adapter is applied by itself, unless a kernel is as fast token by token; fewer take their
# rows out of the pool, all adapters of a layout at once. (Two cores: 8 tokens of one LoRA cost as much either way.)
MANY_TOKENS = 8


@dataclass(frozen=True)
class Placed:
    """A row and its place in the packed step and among the logits."""

    row: Row
    stack: tuple[Resident, ...]
    start: int
    logit_start: int
    logit_stop: int

    @property
    def stop(self) -> int:
        """One past its last token."""
        return self.start + self.row.count

    @property
    def num_logits(self) -> int:
        """Of its last positions, how many have logits."""
        return self.logit_stop - self.logit_start


def place(schedule: Schedule) -> list[Placed]:
    """The rows in packed order: those of one stack together, and beside them those of like layout."""
    stacks: Mapping[Sequence | PrefixRun, tuple[Resident, ...]] = {
        run: (run if isinstance(run, Sequence) else schedule.owners[run]).stack for run in schedule.rows
    }
    tokens_of = Counter[tuple[Resident, ...]]()  # each stack's, in short rows
    for row in schedule:
        if row.count < MANY_TOKENS:
            tokens_of[stacks[row.run]] += row.count
    rows = sorted(schedule, key=lambda row: _packing_order(row, stacks[row.run], tokens_of[stacks[row.run]]))
    placed: list[Placed] = []
    token = logit = 0
    for row in rows:
        count = _wanted_logits(row)
        placed.append(Placed(row, stacks[row.run], token, logit, logit + count))
        token += row.count
        logit += count
    return placed


def _wanted_logits(row: Row) -> int:
    """How many of the row's last positions need logits."""
    run = row.run
    if isinstance(run, PrefixRun):
        return 0
    return max(0, row.stop - max(row.start, run.first_logit))


def _packing_order(row: Row, stack: tuple[Resident, ...], tokens: int) -> tuple[bool, list[int], bool, list[str]]:
    """`tokens` of the stack's short rows: where they are many they must not part the others of their layout."""
    return (
        row.count >= MANY_TOKENS,
        [hash(resident.layout) for resident in stack],
        tokens >= MANY_TOKENS,
        [resident.digest for resident in stack],
    )
