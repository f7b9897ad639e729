"""What the index holds, as immutable values. No reading or writing here.

Times are Unix seconds by the clock of Redis, sizes are bytes. A `Version` never changes; a `Task` is a snapshot.
"""

from __future__ import annotations

from typing import Any

import msgspec

#: Of task and user ids. Without "/", "@" and spaces, which separate ids in keys and in `task@N`.
ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"


class TaskSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an operator says about a task; each call that sets them replaces all of them.

    `template` is Jinja over `input` and `inputs`, `defaults` are sampling fields; the store checks neither.
    """

    description: str = ""
    template: str | None = None
    defaults: dict[str, Any] = {}
    labels: dict[str, str] = {}


class Canary(msgspec.Struct, frozen=True):
    """The version that `percent` of a task's requests use in place of the active one."""

    version: int
    percent: float


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A name that requests use. `previous` is the version that was active before `active`: a rollback's target."""

    name: str
    settings: TaskSettings
    active: int | None
    previous: int | None
    canary: Canary | None = None
    created: float
    updated: float


class FileRecord(msgspec.Struct, frozen=True):
    """A file's content: its address in the blob store (64 hexadecimal digits) and its size."""

    sha256: str
    size: int


class NewVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What a publisher knows of a version; the index adds the number and the time.

    `digest` is the adapter's identity (see `publish.adapter_digest`); `parameters` counts its numbers, `bytes` is its
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
    warnings: list[str] = []


class Version(NewVersion, frozen=True, kw_only=True):
    """An immutable, numbered adapter of a task; numbers start at 1 and are never used again."""

    task: str
    number: int
    created: float
