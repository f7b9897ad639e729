"""Every key of the index, with its type and meaning; nothing else spells a key.

All keys start with the namespace, so that several indexes can share one Redis. A scoped name stands last in its key,
because ids may contain ":" and "/" separates a tenant from an id. Tasks and users in keys and fields are scoped names.
"""

from __future__ import annotations


class Keys:
    """The keys of the index that lives under `namespace`."""

    def __init__(self, namespace: str) -> None:  # noqa: PLR0915 - a table
        self.namespace = namespace
        self.restoring = f"{namespace}:restoring"
        """The namespace under which a restore writes all keys, until its last step gives them their own names."""
        self.restored = f"{namespace}:restored"
        """Set: the keys under `restoring`, without that; what a restore that died has left is found by it."""
        self.index_id = f"{namespace}:index_id"
        """String: a random id, made once; another one means that Redis was emptied or replaced."""
        self.schema = f"{namespace}:schema"
        """String: the number of the layout that these keys follow."""
        self.feed = f"{namespace}:feed"
        """Stream: one entry {kind, and task, user or key} per change, trimmed to about the newest `FEED_LENGTH`."""
        self.tasks = f"{namespace}:tasks"
        """Sorted set, all scores 0: all tasks, as "tenant/id" ("/id" in the default tenant), so as to list them."""
        self.public = f"{namespace}:public"
        """Hash, task id → the scoped name of the one public task of this id."""
        self.numbers = f"{namespace}:numbers"
        """Hash, task → its last version number; outlives the task, so that no number is used twice."""
        self.revisions = f"{namespace}:revisions"
        """Hash, task → the last revision of its settings; outlives the task, as `numbers` does."""
        self.last_used = f"{namespace}:last_used"
        """Sorted set, task → time of its last request."""
        self.customization_history = f"{namespace}:customization_history"
        """List, newest first: the changes of customizations, of all tasks; entries as in `history`."""
        self.words = f"{namespace}:words"
        """Hash, text → its number, in the order of their coming: what customizations have in common with each other."""
        self.condemned = f"{namespace}:condemned"
        """Sorted set, sha256 → the time at which this blob was found to be named by nobody."""
        self.deleting = f"{namespace}:deleting"
        """Sorted set, sha256 → minus the time at which this blob's deletion began; once it ended, for a day, when it
        ended. No change may name a blob that may have been deleted after it was put."""
        self.nothing = f"{namespace}:nothing"
        """Never there: who writes nothing to it learns whether Redis takes writes."""
        self.garbage_lock = f"{namespace}:garbage_lock"
        """String that expires: held by the server that looks for garbage."""
        self.garbage_pause = f"{namespace}:garbage_pause"
        """String that expires: there for an hour after a server began to look for garbage by itself."""
        self.api_keys = f"{namespace}:api_keys"
        """Hash, sha256 of a key's text → its record: the time, a space, JSON."""
        self.api_key_ids = f"{namespace}:api_key_ids"
        """Hash, key id → the sha256 of its text."""
        self.quotas = f"{namespace}:quotas:"
        """Prefix of the windows in which `limits` counts what each API key uses; all of them expire."""
        self.stored_bytes = f"{namespace}:stored_bytes"
        """Hash, API key → the bytes of what it uploaded and still stands."""
        self.payers = f"{namespace}:payers"
        """Hash, API key → the number that customizations name it by, and "#" and that number → API key."""
        self.paid_of = f"{namespace}:paid:"
        """Prefix of `paid`, for the script that deletes all customizations of a user."""
        self._bills = f"{namespace}:bills:"
        self._leases = f"{namespace}:leases:"
        self.customizations_of = f"{namespace}:customizations:"
        """Prefix of `customizations`, for the scripts that go through all of a user's."""
        self.task_of = f"{namespace}:task:"
        self.activations_of = f"{namespace}:activations:"
        self.versions_of = f"{namespace}:versions:"
        """Prefixes of `task`, `activations` and `versions`, for the script that reads many tasks."""
        self._digests = f"{namespace}:digests:"
        self._history = f"{namespace}:history:"
        self._user = f"{namespace}:user:"

    def task(self, name: str) -> str:
        """Hash: `settings` (JSON), `revision`, `created`, `updated`; `active`, `canary` and `percent` where there are
        such."""
        return self.task_of + name

    def versions(self, name: str) -> str:
        """Hash, version number → its record: the time, a space, the `NewVersion` as JSON."""
        return self.versions_of + name

    def digests(self, name: str) -> str:
        """Hash, "digest base_fingerprint" → the number of the version with this content made for this base."""
        return self._digests + name

    def activations(self, name: str) -> str:
        """List, newest first: the versions that were active before the active one, each at most once."""
        return self.activations_of + name

    def history(self, name: str) -> str:
        """List, newest first: the task's changes, each a `HistoryEntry` as a JSON array; outlives the task."""
        return self._history + name

    def customizations(self, name: str) -> str:
        """Hash, user → the customization of this task, as `packed` has it."""
        return self.customizations_of + name

    def paid(self, name: str) -> str:
        """Hash, API key → its part of `stored_bytes` in this task."""
        return self.paid_of + name

    def bills(self, name: str) -> str:
        """Hash, number of a version of this task → "bytes key": whom the upload counts for."""
        return self._bills + name

    def leases(self, key_id: str) -> str:
        """Sorted set, a running request of an API key → when its lease ends; expires with the last one."""
        return self._leases + key_id

    def user(self, name: str) -> str:
        """Sorted set, all scores 0: the tasks that the user customized; tasks deleted since may be among them."""
        return self._user + name
