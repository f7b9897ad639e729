"""What the index holds, as immutable values. No reading or writing here.

Times are Unix seconds by the clock of Redis, sizes are bytes. Tasks and users are named by scoped names (`scope`). A
`Version` never changes; a `Task` is a snapshot.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

#: Of task and user ids. Without "/", "@" and spaces, which separate ids in keys and in `task@N`.
ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"

Mode = Literal["compose", "replace"]
"""How a customization meets its task: over the task's adapter, or in its place."""


class Change(msgspec.Struct, frozen=True):
    """Who changes something: the id of their API key ("" without keys), and the request that asked for it."""

    actor: str = ""
    request_id: str = ""


#: The change of a server's own accord, or of a caller that nobody knows.
BY_NOBODY = Change()


class CustomizationLimits(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What users may lay over a task; None: anything. The store does not check it."""

    methods: list[str] | None = None
    max_virtual_tokens: int | None = None
    max_parameters: int | None = None
    max_bytes: int | None = None


class TaskSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an operator says about a task; each call that sets them replaces all of them.

    `template` is Jinja over `input` and `inputs`, `defaults` are sampling fields; the store checks neither. A `pinned`
    task's adapters stay loaded; a `public` one may be used by all tenants, by its id.
    """

    description: str = ""
    template: str | None = None
    defaults: dict[str, Any] = {}
    labels: dict[str, str] = {}
    public: bool = False
    pinned: bool = False
    customization: CustomizationLimits | None = None


class Canary(msgspec.Struct, frozen=True):
    """The version that `percent` of a task's requests use in place of the active one."""

    version: int
    percent: float


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A name that requests use. `previous` is the newest version that was active before: a rollback's target.

    `settings_revision` counts the changes of the settings and goes on over a deletion: no two settings of a name share
    one.
    """

    name: str
    settings: TaskSettings
    settings_revision: int
    active: int | None
    previous: int | None
    canary: Canary | None = None
    created: float
    updated: float


class FileRecord(msgspec.Struct, frozen=True):
    """A file's content: its address in the blob store (64 hexadecimal digits) and its size."""

    sha256: str
    size: int


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an adapter before the index has it.

    `digest` is the adapter's identity (see `identity.adapter_digest`); `parameters` counts its numbers, `bytes` is its
    size, `base_fingerprint` names the base that it was checked against. `rank` and `virtual_tokens` are what listings
    show; `rank` is None for a method that has none.
    """

    digest: str
    method: str
    parameters: int
    bytes: int
    virtual_tokens: int = 0
    rank: int | None = None
    files: dict[str, FileRecord]
    base_fingerprint: str


class NewVersion(AdapterRecord, frozen=True, kw_only=True):
    """What a publisher knows of a version; the index adds the number and the time."""

    warnings: list[str] = []


class Version(NewVersion, frozen=True, kw_only=True):
    """An immutable, numbered adapter of a task; numbers start at 1 and are never used again."""

    task: str
    number: int
    created: float


class TaskState(NamedTuple):
    """A task with the versions that its pointers name, all of one moment."""

    task: Task
    active: Version | None
    canary: Version | None


class NewCustomization(AdapterRecord, frozen=True, kw_only=True):
    """What a user lays over a task; the index adds the time and the version that is active then."""

    mode: Mode


class Customization(NewCustomization, frozen=True, kw_only=True):
    """A user's own layer over a task, whatever its version. `made_against` was the active one when it was put."""

    user: str
    task: str
    made_against: int | None
    created: float


class HistoryEntry(msgspec.Struct, frozen=True, array_like=True):
    """One change of a task. `id` counts from 1, per task.

    action                 detail
    task_put               `revision`, `settings` in full
    version_published      `version`, `digest`, `activated`
    version_activated      `version`, `previous`
    task_rolled_back       `version`, `previous` (which it was rolled back from)
    version_deleted        `version`
    canary_set             `version` (None where it was cleared), `percent`
    task_deleted           none
    customized             `user`, `task`, `mode`, `digest`
    uncustomized           `user`, `task`
    user_deleted           `user`, `customizations` (how many there were)
    """

    id: int
    time: float
    action: str
    actor: str
    request_id: str
    detail: dict[str, Any]
