"""Page cache: KV pages of known content, shared by the sequences that begin alike. Plain integers; no torch.

A tree. Below the root stands one node for each stack, which holds the pages of its virtual tokens, if it has any;
below that, one node for each full page of text. A node's key is its stack's digests or its page's token ids, so the
path to a node says exactly what its pages hold, and two texts never share a page by a hash's accident.

Whoever refers to a node refers to all above it. A node that nobody refers to is idle: its pages stay until others are
short of pages. Idle nodes stand in two lines (segmented LRU: Karedla, Love, Wherry, "Caching Strategies to Improve Disk
System Performance", IEEE Computer 1994), each in the order in which they became idle: those asked for once, and the
proven ones, which another sequence has asked for again. Virtual tokens are proven from the start, for every request of
their stack begins with them. Pages are given up from the first line; of the second, what is more than half of all idle
pages goes over to the end of the first. So texts that come once do not drive out what many begin with, and what was
proven long ago leaves too.

A sequence lets go of its last page first, and who asks for a node asks for all above it: in its line a node stands
behind those below it, and what stands below one in the first line is there too. So the first one there is a leaf, and
no search is needed to find the one to give up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from server.engine.pages import PagePool

_PROVEN_SHARE = 1 / 2  # of the idle pages, at most: the others are how long what came once has to be asked for again


@dataclass(eq=False)
class CachedPages:
    """A node of the tree: pages whose content the keys from the root to it name."""

    key: Hashable  # among the nodes below its parent
    pages: list[int]
    parent: CachedPages | None  # None: the root
    children: dict[Hashable, CachedPages] = field(default_factory=dict, repr=False)
    holders: int = 1  # who refers to it
    is_proven: bool = False  # which line it stands in when nobody does


class PageCache:
    """The tree, and every page that is not free."""

    def __init__(self, pool: PagePool) -> None:
        """Take pages from, and give them back to, `pool`."""
        self._pool = pool
        self._once: OrderedDict[CachedPages, None] = OrderedDict()  # idle; the next to be given up first
        self._proven: OrderedDict[CachedPages, None] = OrderedDict()  # idle; the next to go over first
        self.root = CachedPages(None, [], None)
        self.num_idle = 0  # pages of idle nodes
        self._num_proven = 0  # of those, proven ones'

    @property
    def available(self) -> int:
        """Pages that may be taken: free ones and idle ones."""
        return self._pool.free + self.num_idle

    def take(self, count: int) -> list[int]:
        """Hand out pages, reclaiming idle ones if need be; the caller has seen that there are enough."""
        while self._pool.free < count:
            self._limit_proven()
            self._remove(next(iter(self._once)))
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
            self._leave_line(node)
        node.holders += 1

    def prove(self, nodes: Iterable[CachedPages]) -> None:
        """A sequence starts that holds these nodes, from its stack's on downwards: that one is proven by its first."""
        for node in nodes:
            assert node.holders, "what is idle stands in a line"
            node.is_proven = True

    def release(self, node: CachedPages, *, keep: bool = True) -> None:
        """One less refers to a node; whoever lets go of several starts at the lowest.

        With `keep` false the node goes at once, unless others refer to it or have gone on from it.
        """
        node.holders -= 1
        if not node.holders:
            self._join_line(node)
            if not node.children and not (keep and node.pages):
                self._remove(node)

    def _limit_proven(self) -> None:
        """Let proven nodes go over to the first line, as if just used, until they keep to their share."""
        while self._num_proven > _PROVEN_SHARE * self.num_idle:
            node = next(iter(self._proven))
            self._leave_line(node)
            node.is_proven = False
            self._join_line(node)

    def _join_line(self, node: CachedPages) -> None:
        self.num_idle += len(node.pages)
        if node.is_proven:
            self._proven[node] = None
            self._num_proven += len(node.pages)
        else:
            self._once[node] = None

    def _leave_line(self, node: CachedPages) -> None:
        self.num_idle -= len(node.pages)
        if node.is_proven:
            del self._proven[node]
            self._num_proven -= len(node.pages)
        else:
            del self._once[node]

    def _remove(self, node: CachedPages) -> None:
        """Forget an idle leaf; its pages are free. A node above that has none goes with its last leaf."""
        parent = node.parent
        assert parent is not None
        assert not node.children, "leaves go first"
        self._leave_line(node)
        del parent.children[node.key]
        self._pool.give(node.pages)
        if not (parent.holders or parent.children or parent.pages):
            self._remove(parent)
