"""Stop strings over text that arrives in pieces.

Text is held back while it could still become a stop string, so a caller never sees the start of one. The stop
string itself is not returned. Where several match, the one that begins first ends the text.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The search in one text."""

    def __init__(self, strings: Sequence[str]) -> None:
        """`strings`: none of them empty."""
        self._strings = strings
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is safe to hand out; after a match, the text before it and nothing more."""
        self._held += text
        starts = [start for string in self._strings if (start := self._held.find(string)) >= 0]
        if starts:
            self.found = True
            return self._release(min(starts))
        return self._release(len(self._held) - max((self._overlap(string) for string in self._strings), default=0))

    def flush(self) -> str:
        """At the end: what was held back and did not become a stop string."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _overlap(self, string: str) -> int:
        """How much of the held text's end is the beginning of `string`."""
        longest = min(len(string) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(string[:size])), 0)
