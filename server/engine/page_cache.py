"""Page cache: KV pages of known content, shared by the sequences that begin alike. Plain integers; no torch.

A tree. Below the root stands one node for each stack, which holds the pages of its virtual tokens, if it has any;
below that, one node for each full page of text. A node's key is its stack's digests or its page's token ids, so the
path to a node says exactly what its pages hold, and two texts never share a page by a hash's accident.

Whoever refers to a node refers to all above it. A node that nobody refers to is idle: its pages stay until others are
short of pages, least recently used first. Idle nodes are kept in the order in which they became idle. A sequence lets
go of its last page first, so a node always stands behind those below it: the first idle node is a leaf, and no
search is needed to find the one to give up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from server.engine.pages import PagePool


@dataclass(eq=False)
class CachedPages:
    """A node of the tree: pages whose content the keys from the root to it name."""

    key: Hashable  # among the nodes below its parent
    pages: list[int]
    parent: CachedPages | None  # None: the root
    children: dict[Hashable, CachedPages] = field(default_factory=dict, repr=False)
    holders: int = 1  # who refers to it


class PageCache:
    """The tree, and every page that is not free."""

    def __init__(self, pool: PagePool) -> None:
        """Take pages from, and give them back to, `pool`."""
        self._pool = pool
        self._idle: OrderedDict[CachedPages, None] = OrderedDict()  # the next to be given up first
        self.root = CachedPages(None, [], None)
        self.num_idle = 0  # pages of idle nodes

    @property
    def available(self) -> int:
        """Pages that may be taken: free ones and idle ones."""
        return self._pool.free + self.num_idle

    def take(self, count: int) -> list[int]:
        """Hand out pages, reclaiming idle ones if need be; the caller has seen that there are enough."""
        while self._pool.free < count:
            self._remove(next(iter(self._idle)))
        return self._pool.take(count)

    def give(self, pages: Iterable[int]) -> None:
        """Take back pages that no node has."""
        self._pool.give(pages)

    def add(self, node: CachedPages) -> None:
        """Put a new node below its parent; its one holder is the caller's, who holds the parent too."""
        assert node.parent is not None
        assert node.key not in node.parent.children, "one node for one content"
        node.parent.children[node.key] = node

    def hold(self, node: CachedPages) -> None:
        """One more refers to a node; it refers to all above it as well."""
        if not node.holders:
            del self._idle[node]
            self.num_idle -= len(node.pages)
        node.holders += 1

    def release(self, node: CachedPages, *, keep: bool = True) -> None:
        """One less refers to a node; whoever lets go of several starts at the lowest.

        With `keep` false the node goes at once, unless others refer to it or have gone on from it.
        """
        node.holders -= 1
        if not node.holders:
            self._idle[node] = None
            self.num_idle += len(node.pages)
            if not node.children and not (keep and node.pages):
                self._remove(node)

    def _remove(self, node: CachedPages) -> None:
        """Forget an idle leaf; its pages are free."""
        assert node.parent is not None
        assert not node.children, "leaves go first"
        del self._idle[node]
        del node.parent.children[node.key]
        self.num_idle -= len(node.pages)
        self._pool.give(node.pages)
