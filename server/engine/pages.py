"""Which KV pages are free. Plain integers; the tensors are `server.model.kv_cache`'s."""

from __future__ import annotations

from collections.abc import Iterable


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_size)


class PagePool:
    """Pages 1 … `num_pages` - 1; page 0 is the null page and nobody's."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        """All free."""
        self.page_size = page_size
        self.capacity = num_pages - 1
        # What was given back last is taken first, and new pages one behind the other: their memory is at hand.
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def free(self) -> int:
        """Pages that may be taken."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody has."""
        return self.capacity - len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out pages; the caller has seen that there are enough."""
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: Iterable[int]) -> None:
        """Take pages back."""
        self._free.extend(pages)
