"""Every key of the index, with its type and meaning; nothing else spells a key.

All keys start with the namespace, so that several indexes can share one Redis. An id stands last in its key, because
ids may contain ":"; where a later key needs two ids, "/" separates them, which no id contains.
"""

from __future__ import annotations


class Keys:
    """The keys of the index that lives under `namespace`."""

    def __init__(self, namespace: str) -> None:
        self.index_id = f"{namespace}:index_id"
        """String: a random id, made once; another one means that Redis was emptied or replaced."""
        self.schema = f"{namespace}:schema"
        """String: the number of the layout that these keys follow."""
        self.feed = f"{namespace}:feed"
        """Stream: one entry {kind, task} per change, trimmed to about the newest `FEED_LENGTH`."""
        self.tasks = f"{namespace}:tasks"
        """Sorted set, all scores 0: the names of all tasks, for listing them in order."""
        self.numbers = f"{namespace}:numbers"
        """Hash, task → its last version number; outlives the task, so that no number is used twice."""
        self.last_used = f"{namespace}:last_used"
        """Sorted set, task → time of its last request."""
        self._task = f"{namespace}:task:"
        self._versions = f"{namespace}:versions:"
        self._digests = f"{namespace}:digests:"
        self._activations = f"{namespace}:activations:"

    def task(self, name: str) -> str:
        """Hash: `settings` (JSON), `active`, `created`, `updated`, and `canary` (JSON) where there is one."""
        return self._task + name

    def versions(self, name: str) -> str:
        """Hash, version number → its record: the time, a space, the `NewVersion` as JSON."""
        return self._versions + name

    def digests(self, name: str) -> str:
        """Hash, "digest base_fingerprint" → the number of the version with this content made for this base."""
        return self._digests + name

    def activations(self, name: str) -> str:
        """List, newest first: the versions that were active before the active one, each at most once."""
        return self._activations + name
