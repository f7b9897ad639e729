"""Prefix pages: the KV pages of a stack's virtual tokens, held once and shared by all its sequences.

A prefix is computed or copied when its first sequence starts and is then read-only. Sequences refer to its
full pages and copy the last, partly filled one, unless a page of the cache begins with the same text. It is the node
of its stack in the page cache: the row deltas of a stack change the keys and values of its virtual tokens and of its
text, so everything stands below the content of the whole stack.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.page_cache import CachedPages


@dataclass(frozen=True)
class Span:
    """Neighbouring virtual tokens of one adapter of the stack."""

    start: int
    stop: int
    level: int  # which adapter of the stack
    is_run: bool  # embeddings, run through the model; else keys and values, copied
    takes_positions: bool = True  # else what follows has the positions that it would have without them

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return self.stop - self.start


def unnumbered(spans: tuple[Span, ...], start: int) -> int:
    """How many of the virtual tokens before `start` take no position: tokens from there on have their index less this
    as their position."""
    return sum(span.length for span in spans if not span.takes_positions and span.stop <= start)


@dataclass(eq=False)
class PrefixRun(CachedPages):
    """One stack's virtual tokens in pages, as far as they are computed; without any, only the stack's node."""

    spans: tuple[Span, ...] = ()
    num_computed: int = 0  # once the step under way has run

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return self.spans[-1].stop if self.spans else 0

    @property
    def next_span(self) -> Span:
        """The span in which the next uncomputed position lies."""
        return next(span for span in self.spans if span.stop > self.num_computed)
