"""The scheduler: which positions of which sequences run in the next step. Plain integers; no torch.

    running   sequences with pages, in order of arrival
    waiting   sequences whose adapters are resident, in the order of `server.engine.queue`

Rows that need one position (running streams) come first, then the rest of the token budget goes to prompts, in
chunks. A sequence starts behind the cached pages that begin as it does, and its own full pages are cached as soon as
it is certain that the step computes them. When pages run out, idle ones are reclaimed, then the newest sequence is
preempted: it gives its pages back and later computes the same tokens again, unless it finds them. The oldest always
goes on, so everything ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.page_cache import PageCache
from server.engine.pages import PagePool, pages_for
from server.engine.prefixes import PrefixRun, Span
from server.engine.queue import WaitingQueue
from server.engine.sequence import Sequence
from server.engine.shared_text import cached_tail, cached_text, leave_tail, share_pages

PROMPT_LOGPROB_CHUNK = 512  # positions of prompts in a step that need logits


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
    """A partly filled page becomes the sequence's first own page: the prefix's last, or that of a choice's input."""

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
    logit_room: int = PROMPT_LOGPROB_CHUNK  # positions of prompts that may still ask for logits
    num_preempted: int = 0
    num_prompt_tokens: int = 0  # of the sequences that start for the first time, virtual ones counted
    num_cached_tokens: int = 0  # of those, the ones that are not computed

    def __iter__(self) -> Iterator[Row]:
        for rows in self.rows.values():
            yield from rows


class Scheduler:
    """See the module."""

    def __init__(self, pages: PagePool, *, max_seqs: int, max_batch_tokens: int, max_prefill_tokens: int) -> None:
        """`max_batch_tokens` is at least `max_seqs`, so that every running stream is in every step; of what they leave
        of it, prompts and virtual tokens get up to `max_prefill_tokens`."""
        self.pages = pages
        self.cache = PageCache(pages)
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue()
        self._max_seqs = max_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_prefill_tokens = max_prefill_tokens
        self._unused_pages: list[int] = []  # fresh ones of a step that was planned ahead and did not come

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose stack is resident."""
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Forget a sequence, wherever it is; its pages are free or idle at once. With `keep` false those that nobody
        else refers to leave the cache: what they hold is of no use."""
        if sequence in self.running:
            self.running.remove(sequence)
            if keep:
                leave_tail(sequence, self.cache, self.pages.page_size)
            self._release(sequence, keep=keep)
            self.waiting.end(sequence)
        elif sequence in self.waiting:
            self.waiting.end(sequence)

    def pages_needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that a sequence takes when it is alone and has `num_tokens` positions, its prefix's counted."""
        size = self.pages.page_size
        return pages_for(sequence.num_virtual, size) + pages_for(num_tokens, size) - sequence.num_prefix // size

    def schedule(self) -> Schedule:
        """Choose the next step's rows; counts them as computed."""
        step = Schedule(fresh_pages=self._unused_pages)
        self._unused_pages = []
        streams = [sequence for sequence in self.running if sequence.num_remaining == 1]
        prompts = [sequence for sequence in self.running if sequence.num_remaining > 1]
        room = self._max_batch_tokens
        for stream in streams:
            room -= self._extend(stream, 1, step)
        budget = min(room, self._max_prefill_tokens)
        for prompt in prompts:
            budget -= self._extend(prompt, budget, step)
        for sequence in streams + prompts:
            if sequence in step.rows:  # nobody is preempted from here on: what a row fills will be there
                self._share_pages(sequence, step)
        while budget and self._may_start and not step.num_preempted:
            spent = self._start(self.waiting.head(), budget, step)
            if spent is None:
                break
            budget -= spent
        return step

    @property
    def _may_start(self) -> bool:
        """Whether somebody waits for whom there is a row."""
        return bool(self.waiting) and len(self.running) < self._max_seqs

    def plan_ahead(self, step: Schedule) -> Schedule | None:
        """While `step` is under way: the one behind it, where all that it depends on but the tokens is known.

        Every running sequence gets a token from `step` and goes on, nobody could start, and there are pages. These are
        taken; nothing else is counted before `confirm`.
        """
        if self._may_start or step.rows.keys() != set(self.running):
            return None
        if any(each.num_remaining or len(each.output) + 1 >= each.sampling.max_tokens for each in self.running):
            return None
        size = self.pages.page_size
        needed = sum(pages_for(each.num_tokens + 1, size) - len(each.block_table) for each in self.running)
        if needed > self.cache.available:
            return None
        ahead = Schedule()
        for sequence in self.running:
            self._reserve(sequence, sequence.num_tokens + 1, ahead)
            ahead.rows[sequence] = [Row(sequence, sequence.num_tokens, 1)]
        return ahead

    def confirm(self, ahead: Schedule) -> bool:
        """Count a step that was planned ahead, if it is still what `schedule` would choose; else forget it."""
        if self._may_start or list(ahead.rows) != self.running:
            self._unused_pages = ahead.fresh_pages
            return False
        for sequence in self.running:
            sequence.num_computed += 1
            self.waiting.charge(sequence, sequence.num_computed - 1, sequence.num_computed)
            self._share_pages(sequence, ahead)
        return True

    def _extend(self, sequence: Sequence, budget: int, step: Schedule) -> int:
        """Schedule a running sequence's next positions; the number of them."""
        count = min(sequence.num_remaining, budget)
        first_scored = sequence.num_tokens  # a stream's logits are not a prompt's
        if sequence.sampling.prompt_logprobs_from is not None and sequence.num_remaining > 1:
            first_scored = max(sequence.first_logit, sequence.num_computed)
            count = min(count, first_scored + step.logit_room - sequence.num_computed)
        is_running = bool(sequence.block_table)  # not preempted for one before it
        if not (count and is_running and self._reserve(sequence, sequence.num_computed + count, step)):
            return 0
        step.rows[sequence] = [Row(sequence, sequence.num_computed, count)]
        sequence.num_computed += count
        step.logit_room -= max(0, sequence.num_computed - first_scored)
        self.waiting.charge(sequence, sequence.num_computed - count, sequence.num_computed)
        return count

    def _reserve(self, sequence: Sequence, num_tokens: int, step: Schedule) -> bool:
        """Give a running sequence pages for its first `num_tokens` positions, preempting newer ones for it.
        False: it was the newest itself."""
        needed = pages_for(num_tokens, self.pages.page_size) - len(sequence.block_table)
        while needed > self.cache.available:
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return False
        if needed > 0:
            sequence.block_table += self._take_pages(needed, step)
        return True

    def _preempt(self, sequence: Sequence, step: Schedule) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.put_back(sequence)
        step.rows.pop(sequence, None)
        step.num_preempted += 1

    def _start(self, sequence: Sequence, budget: int, step: Schedule) -> int | None:
        """Start the first waiting sequence, its prefix before it if that is not there yet.

        Returns the positions spent; None when there are no pages for it, no room for its logits, or only part of the
        prefix could run: then nothing else may start in this step, for it might be given the pages of what runs.
        """
        if sequence.sampling.prompt_logprobs_from is not None and not step.logit_room:
            return None
        prefix = self._hold_prefix(sequence, step)
        if prefix is None:
            return None
        spent = self._extend_prefix(prefix, sequence, budget, step)
        if prefix.num_computed < prefix.length or spent == budget or not self._place(sequence, prefix, step):
            self._release(sequence)
            return None
        self.waiting.start(sequence)
        self.running.append(sequence)
        spent += self._extend(sequence, budget - spent, step)
        self._share_pages(sequence, step)
        return spent

    def _share_pages(self, sequence: Sequence, step: Schedule) -> None:
        share_pages(sequence, self.cache, self.pages.page_size, step.rows[sequence][0].start)

    def _hold_prefix(self, sequence: Sequence, step: Schedule) -> PrefixRun | None:
        """The node of the sequence's stack, with pages for its virtual tokens; None when there are none for it."""
        node = self.cache.root.children.get(sequence.stack_key)
        if node is not None:
            assert isinstance(node, PrefixRun)
            self.cache.hold(node)
        else:
            needed = pages_for(sequence.num_virtual, self.pages.page_size)
            if needed > self.cache.available:
                return None
            pages = self._take_pages(needed, step)
            node = PrefixRun(sequence.stack_key, pages, self.cache.root, spans=sequence.spans)
            self.cache.add(node)
        if sequence.num_cached_virtual is None:
            sequence.num_cached_virtual = min(node.num_computed, sequence.num_prefix)
        sequence.prefix = node
        return node

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
                self.waiting.charge_prefix(sequence, count)
            else:
                step.prefix_copies.append(PrefixCopy(prefix, span, sequence))
            prefix.num_computed += count
        return spent

    def _place(self, sequence: Sequence, prefix: PrefixRun, step: Schedule) -> bool:
        """Give a starting sequence its pages: its prefix's, cached ones, its own. False: there are too few."""
        size = self.pages.page_size
        sequence.text_nodes = cached_text(sequence, prefix, size)
        for node in sequence.text_nodes:
            self.cache.hold(node)
        num_shared = sequence.num_prefix // size
        sequence.num_shared_pages = num_shared
        needed = pages_for(sequence.num_tokens, size) - num_shared - len(sequence.text_nodes)
        if needed > self.cache.available:
            return False
        tail = cached_tail(sequence, prefix, size)
        if tail is not None and needed + (not tail.holders) <= self.cache.available:
            self.cache.hold(tail)
            sequence.tail = tail
        own = self._take_pages(needed, step)
        sequence.block_table = prefix.pages[:num_shared] + [node.pages[0] for node in sequence.text_nodes] + own
        sequence.num_computed = sequence.num_prefix
        if sequence.tail is not None:
            assert sequence.input_stop is not None
            sequence.num_computed = sequence.input_stop
            step.page_copies.append(PageCopy(sequence, sequence.tail.pages[0], own[0]))
        elif sequence.text_nodes:
            sequence.num_computed = (num_shared + len(sequence.text_nodes)) * size
        elif sequence.num_prefix % size:
            step.page_copies.append(PageCopy(sequence, prefix.pages[num_shared], own[0]))
        if sequence.num_cached_text is None:
            self.cache.prove([prefix, *sequence.text_nodes, *([sequence.tail] if sequence.tail else [])])
            sequence.num_cached_text = sequence.num_computed - sequence.num_prefix
            step.num_prompt_tokens += sequence.num_prompt
            step.num_cached_tokens += sequence.num_cached
        return True

    def _take_pages(self, count: int, step: Schedule) -> list[int]:
        pages = self.cache.take(count)
        step.fresh_pages += pages
        return pages

    def _release(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Let go of all that a sequence has or refers to."""
        assert sequence.prefix is not None
        nodes = [sequence.prefix, *sequence.text_nodes, *([sequence.tail] if sequence.tail else [])]
        shared = {page for node in nodes for page in node.pages}
        self.cache.give(page for page in sequence.block_table if page not in shared)
        for node in reversed(nodes):
            self.cache.release(node, keep=keep)
        sequence.prefix, sequence.text_nodes, sequence.tail, sequence.block_table = None, [], None, []
        sequence.num_shared_pages, sequence.num_computed = 0, 0
