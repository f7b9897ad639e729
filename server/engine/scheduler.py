"""The scheduler: which positions of which sequences run in the next step. Plain integers; no torch.

    running   sequences with pages, in order of arrival
    waiting   sequences whose adapters are resident, first come first served; preempted ones stand first

Rows that need one position (running streams) come first, then the rest of the token budget goes to prompts, in
chunks. When pages run out, idle prefixes are reclaimed, then the newest sequence is preempted: it gives its
pages back and later computes the same tokens again. The oldest always goes on, so everything ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.pages import PagePool, pages_for
from server.engine.prefixes import PrefixPool, PrefixRun, Span
from server.engine.sequence import Sequence

PROMPT_LOGPROB_CHUNK = 512  # positions a step for prompts whose every position needs logits


@dataclass(frozen=True)
class Row:
    """Positions `start` … `start + count - 1` of a sequence or a prefix."""

    run: Sequence | PrefixRun
    start: int
    count: int

    @property
    def stop(self) -> int:
        """One past its last position."""
        return self.start + self.count


@dataclass(frozen=True)
class PrefixCopy:
    """A span of keys and values to be copied into a prefix's pages; `stack` is of a sequence that has it."""

    prefix: PrefixRun
    span: Span
    sequence: Sequence


@dataclass(frozen=True)
class PageCopy:
    """The prefix's last, partly filled page becomes the sequence's first own page."""

    sequence: Sequence
    source: int
    target: int


@dataclass
class Schedule:
    """One step: page operations in the order of the fields, then all rows in one forward pass."""

    fresh_pages: list[int] = field(default_factory=list)  # to be zeroed
    prefix_copies: list[PrefixCopy] = field(default_factory=list)
    page_copies: list[PageCopy] = field(default_factory=list)
    rows: dict[Sequence | PrefixRun, list[Row]] = field(default_factory=dict)
    owners: dict[PrefixRun, Sequence] = field(default_factory=dict)  # a sequence whose stack the prefix has
    num_preempted: int = 0

    def __iter__(self) -> Iterator[Row]:
        for rows in self.rows.values():
            yield from rows


class Scheduler:
    """See the module."""

    def __init__(self, pages: PagePool, *, max_seqs: int, max_batch_tokens: int) -> None:
        """`max_batch_tokens` is at least `max_seqs`, so that every running stream is in every step."""
        self.pages = pages
        self.prefixes = PrefixPool(pages)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._max_seqs = max_seqs
        self._max_batch_tokens = max_batch_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose stack is resident."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its pages are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_pages(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def pages_needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that a sequence takes when it is alone and has `num_tokens` positions, its prefix's counted."""
        size = self.pages.page_size
        prefix = pages_for(sequence.num_virtual, size) if sequence.num_prefix > 0 else 0
        return prefix + pages_for(num_tokens, size) - max(sequence.num_prefix, 0) // size

    def schedule(self) -> Schedule:
        """Choose the next step's rows; counts them as computed."""
        step = Schedule()
        budget = self._max_batch_tokens
        streams = [sequence for sequence in self.running if sequence.num_remaining == 1]
        prompts = [sequence for sequence in self.running if sequence.num_remaining > 1]
        for sequence in streams + prompts:
            if budget and sequence in self.running:  # not preempted for one before it
                budget -= self._extend(sequence, budget, step)
        while budget and self.waiting and len(self.running) < self._max_seqs and not step.num_preempted:
            spent = self._start(self.waiting[0], budget, step)
            if spent is None:
                break
            budget -= spent
        return step

    def _extend(self, sequence: Sequence, budget: int, step: Schedule) -> int:
        """Schedule a running sequence's next positions; the number of them."""
        count = min(sequence.num_remaining, budget)
        if sequence.sampling.prompt_logprobs:
            count = min(count, PROMPT_LOGPROB_CHUNK)
        if not self._reserve(sequence, sequence.num_computed + count, step):
            return 0
        step.rows[sequence] = [Row(sequence, sequence.num_computed, count)]
        sequence.num_computed += count
        return count

    def _reserve(self, sequence: Sequence, num_tokens: int, step: Schedule) -> bool:
        """Give a running sequence pages for its first `num_tokens` positions, preempting newer ones for it.
        False: it was the newest itself."""
        held = sequence.num_shared_pages + len(sequence.own_pages)
        needed = pages_for(num_tokens, self.pages.page_size) - held
        while needed > self.pages.free:
            self.prefixes.reclaim(needed)
            if needed > self.pages.free:
                victim = self.running[-1]
                self._preempt(victim, step)
                if victim is sequence:
                    return False
        self._take_pages(sequence, needed, step)
        return True

    def _preempt(self, sequence: Sequence, step: Schedule) -> None:
        self.running.remove(sequence)
        self._give_pages(sequence)
        self.waiting.appendleft(sequence)
        step.rows.pop(sequence, None)
        step.num_preempted += 1

    def _start(self, sequence: Sequence, budget: int, step: Schedule) -> int | None:
        """Start the first waiting sequence, its prefix before it if that is not there yet.

        Returns the positions spent; None when there are no pages for it, or only part of the prefix could run.
        """
        spent = 0
        prefix = None
        if sequence.num_prefix > 0:
            prefix = self._prefix(sequence, step)
            if prefix is None:
                return None
            if sequence.num_cached is None:
                sequence.num_cached = min(prefix.num_computed, sequence.num_prefix)
            spent = self._extend_prefix(prefix, sequence, budget, step)
            if prefix.num_computed < prefix.length or spent == budget:
                return None
        size = self.pages.page_size
        num_shared_pages = max(sequence.num_prefix, 0) // size
        needed = pages_for(sequence.num_tokens, size) - num_shared_pages
        self.prefixes.reclaim(needed, keep=prefix)
        if needed > self.pages.free:
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.num_computed = max(sequence.num_prefix, 0)
        self._take_pages(sequence, needed, step)
        if prefix is not None:
            self.prefixes.hold(prefix)
            sequence.prefix, sequence.num_shared_pages = prefix, num_shared_pages
            if sequence.num_prefix % size:
                copy = PageCopy(sequence, prefix.pages[num_shared_pages], sequence.own_pages[0])
                step.page_copies.append(copy)
        return spent + self._extend(sequence, budget - spent, step)

    def _prefix(self, sequence: Sequence, step: Schedule) -> PrefixRun | None:
        """The sequence's prefix with its pages; None when there are no pages for it."""
        prefix = self.prefixes.find(sequence.stack_key)
        if prefix is None:
            needed = pages_for(sequence.num_virtual, self.pages.page_size)
            self.prefixes.reclaim(needed)
            if needed > self.pages.free:
                return None
            prefix = self.prefixes.create(sequence.stack_key, sequence.spans)
            step.fresh_pages += prefix.pages
        return prefix

    def _extend_prefix(self, prefix: PrefixRun, sequence: Sequence, budget: int, step: Schedule) -> int:
        """Schedule what is missing of a prefix, within the budget; the positions spent."""
        spent = 0
        while prefix.num_computed < prefix.length:
            span = prefix.next_span
            count = span.length
            if span.is_run:
                count = min(span.stop - prefix.num_computed, budget - spent)
                if not count:
                    break
                step.rows.setdefault(prefix, []).append(Row(prefix, prefix.num_computed, count))
                step.owners[prefix] = sequence
                spent += count
            else:
                step.prefix_copies.append(PrefixCopy(prefix, span, sequence))
            prefix.num_computed += count
        return spent

    def _take_pages(self, sequence: Sequence, count: int, step: Schedule) -> None:
        pages = self.pages.take(max(count, 0))
        sequence.own_pages += pages
        step.fresh_pages += pages

    def _give_pages(self, sequence: Sequence) -> None:
        self.pages.give(sequence.own_pages)
        sequence.own_pages = []
        if sequence.prefix is not None:
            self.prefixes.release(sequence.prefix)
        sequence.prefix, sequence.num_shared_pages, sequence.num_computed = None, 0, 0
