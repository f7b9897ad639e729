"""Shared text: which cached pages a sequence starts behind, and which of its own it leaves for others.

Full pages are shared, and nobody writes to a full page again. A sequence that runs its last virtual token itself has no
text that another could begin with (it has none, or all of it is scored) and takes no part.

A choice that is scored leaves nothing of the choice itself, only its input; of that also the last, partly filled page:
as long as it runs it writes there, so it leaves that page when it ends, and other choices for the same input begin
with a copy of it (what stands behind the input in it is overwritten before it is read).
"""

from __future__ import annotations

from server.engine.page_cache import CachedPages, PageCache
from server.engine.prefixes import PrefixRun
from server.engine.sequence import Sequence


def cached_text(sequence: Sequence, prefix: PrefixRun, page_size: int) -> list[CachedPages]:
    """Nodes of the longest beginning of the sequence's text that is cached below its stack's node.

    Positions whose logits are needed are never among it: its last, and those that score its prompt.
    """
    nodes: list[CachedPages] = []
    if sequence.num_prefix < sequence.num_virtual:
        return nodes
    children = prefix.children
    for page in range(sequence.num_virtual // page_size, sequence.first_logit // page_size):
        node = children.get(sequence.page_key(page, page_size))
        if node is None:
            break
        nodes.append(node)
        children = node.children
    return nodes


def share_pages(sequence: Sequence, cache: PageCache, page_size: int, first_row: int) -> None:
    """Put the sequence's full pages into the cache; `first_row` is the first position that it computes in this step.

    Another may have cached the same content. A page that this step's row still writes then stays the sequence's own
    until its next step, which exchanges it: two rows never write one page.
    """
    if sequence.num_prefix < sequence.num_virtual:
        return
    assert sequence.prefix is not None
    stop = sequence.num_computed if sequence.input_stop is None else min(sequence.num_computed, sequence.input_stop)
    while (page := sequence.num_shared_pages + len(sequence.text_nodes)) < stop // page_size:
        parent = sequence.text_nodes[-1] if sequence.text_nodes else sequence.prefix
        key = sequence.page_key(page, page_size)
        node = parent.children.get(key)
        if node is None:
            node = CachedPages(key, [sequence.block_table[page]], parent)
            cache.add(node)
        elif (page + 1) * page_size <= first_row:
            cache.hold(node)
            cache.give([sequence.block_table[page]])
            sequence.block_table[page] = node.pages[0]
        else:
            return
        sequence.text_nodes.append(node)


def cached_tail(sequence: Sequence, prefix: PrefixRun, page_size: int) -> CachedPages | None:
    """The node of a page that begins with the rest of a choice's input, behind its cached pages; None: there is none,
    or the sequence is no choice."""
    key = _tail_key(sequence, page_size)
    parent = sequence.text_nodes[-1] if sequence.text_nodes else prefix
    return parent.children.get(key) if key else None


def leave_tail(sequence: Sequence, cache: PageCache, page_size: int) -> None:
    """A choice that has run ends: put the page with the rest of its input into the cache, unless it is there."""
    key = _tail_key(sequence, page_size)
    if not key or sequence.tail is not None or sequence.num_computed < (sequence.input_stop or 0):
        return
    assert sequence.prefix is not None
    parent = sequence.text_nodes[-1] if sequence.text_nodes else sequence.prefix
    if key not in parent.children:
        page = sequence.block_table[sequence.num_shared_pages + len(sequence.text_nodes)]
        sequence.tail = CachedPages(key, [page], parent)
        cache.add(sequence.tail)


def _tail_key(sequence: Sequence, page_size: int) -> tuple[int, ...]:
    """The text of a choice's input behind its cached pages, shorter than a page's; empty: none, or not all pages before
    it are cached."""
    stop = sequence.input_stop
    page = sequence.num_shared_pages + len(sequence.text_nodes)
    if stop is None or page != stop // page_size:
        return ()
    return tuple(sequence.token_ids(max(sequence.num_virtual, page * page_size), stop))
