"""Shared text: which cached pages a sequence starts behind, and which of its own it leaves for others.

Only full pages are shared, and nobody writes to a full page again. A sequence without a prompt has no text that
another could begin with and takes no part.
"""

from __future__ import annotations

from server.engine.page_cache import CachedPages, PageCache
from server.engine.prefixes import PrefixRun
from server.engine.sequence import Sequence


def cached_text(sequence: Sequence, prefix: PrefixRun, page_size: int) -> list[CachedPages]:
    """Nodes of the longest beginning of the sequence's text that is cached below its stack's node.

    Its last position is never among it, for that one's logits are needed; nor is anything of a prompt whose every
    position needs logits.
    """
    nodes: list[CachedPages] = []
    if not sequence.request.prompt or sequence.sampling.prompt_logprobs:
        return nodes
    children = prefix.children
    for page in range(sequence.num_virtual // page_size, (sequence.num_tokens - 1) // page_size):
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
    if not sequence.request.prompt:
        return
    assert sequence.prefix is not None
    while (page := sequence.num_shared_pages + len(sequence.text_nodes)) < sequence.num_computed // page_size:
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
