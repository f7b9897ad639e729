"""Prefix pages: the KV pages of a stack's virtual tokens, held once and shared by all its sequences.

A prefix is computed or copied when its first sequence starts and is then read-only. Sequences refer to its
full pages and copy the last, partly filled one. Idle prefixes stay, since their pages may be needed again, and
are reclaimed, least recently used first, when pages run short. The key is the content of the whole stack: the
row deltas of a stack change its virtual tokens' keys and values too.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from server.engine.pages import PagePool, pages_for


@dataclass(frozen=True)
class Span:
    """Neighbouring virtual tokens of one adapter of the stack."""

    start: int
    stop: int
    level: int  # which adapter of the stack
    is_run: bool  # embeddings, run through the model; else keys and values, copied

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return self.stop - self.start


@dataclass(eq=False)
class PrefixRun:
    """One stack's virtual tokens in pages, as far as they are computed."""

    key: tuple[str, ...]  # digests of the stack
    spans: tuple[Span, ...]
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0  # once the step under way has run
    holders: int = 0  # sequences that refer to it

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return self.spans[-1].stop

    @property
    def next_span(self) -> Span:
        """The span in which the next uncomputed position lies."""
        return next(span for span in self.spans if span.stop > self.num_computed)


class PrefixPool:
    """All prefixes that have pages."""

    def __init__(self, pages: PagePool) -> None:
        """Take pages from, and give them back to, `pages`."""
        self._pages = pages
        self._prefixes: OrderedDict[tuple[str, ...], PrefixRun] = OrderedDict()  # least recently used first

    def find(self, key: tuple[str, ...]) -> PrefixRun | None:
        """The prefix of a stack, if it has pages."""
        return self._prefixes.get(key)

    def create(self, key: tuple[str, ...], spans: tuple[Span, ...]) -> PrefixRun:
        """A new prefix with pages for all of it; the caller has seen that there are enough."""
        prefix = PrefixRun(key, spans)
        prefix.pages = self._pages.take(pages_for(prefix.length, self._pages.page_size))
        self._prefixes[key] = prefix
        return prefix

    def hold(self, prefix: PrefixRun) -> None:
        """A sequence refers to it from now on."""
        prefix.holders += 1
        self._prefixes.move_to_end(prefix.key)

    def release(self, prefix: PrefixRun) -> None:
        """A sequence no longer refers to it."""
        prefix.holders -= 1

    def reclaim(self, wanted: int, keep: PrefixRun | None = None) -> None:
        """Give up idle prefixes, except `keep`, until `wanted` pages are free or none is left."""
        for key, prefix in list(self._prefixes.items()):
            if self._pages.free >= wanted:
                return
            if not prefix.holders and prefix is not keep:
                del self._prefixes[key]
                self._pages.give(prefix.pages)
