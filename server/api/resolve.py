"""From a name in a request to what serves it: the base, a task's active version, or `task@N`.

What is resolved is pinned: a request ends on the version that it started on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapters_store import ADAPTER_FILES, Conflict, NotFound, TaskSettings, Version
from server.api.services import ServedBase, Services
from server.engine.protocol import AdapterRef
from server.errors import RequestError

BASE_LABEL = "base"  # of the metrics


@dataclass(frozen=True)
class Target:
    """What a request runs under."""

    task: str | None  # None: the base alone
    settings: TaskSettings
    version: Version | None

    @property
    def label(self) -> str:
        """For the metrics."""
        return BASE_LABEL if self.task is None else self.task

    @property
    def stack(self) -> tuple[AdapterRef, ...]:
        """The adapters, task's first."""
        if self.version is None:
            return ()
        return (adapter_of(self.version),)

    @property
    def virtual_tokens(self) -> int:
        """Of the stack."""
        return 0 if self.version is None else self.version.virtual_tokens

    def medley(self, user: str | None) -> dict[str, Any]:
        """The response's `medley` block: what was really applied."""
        return {
            "task": self.task,
            "version": None if self.version is None else self.version.number,
            "user": user,
            "customization": None,
            "methods": [] if self.version is None else [self.version.method],
        }


def adapter_of(version: Version) -> AdapterRef:
    """A version's adapter, for the engine."""
    files = {name: version.files[name].sha256 for name in ADAPTER_FILES if name in version.files}
    return AdapterRef(version.digest, files)


async def resolve(services: Services, base: ServedBase, name: str, *, param: str) -> Target:
    """What `name` stands for; `param` is the field that it came in.

    Raises `RequestError`: `model_not_found` (or `task_not_found`, as `param` says), `version_not_found`,
    `no_active_version`, `base_mismatch`; `StoreUnavailable` for a name that cannot be looked up now.
    """
    if name == base.facts.id:
        return Target(None, TaskSettings(), None)
    try:
        task, version = await services.directory.resolve(name)
    except NotFound as error:
        raise not_found(error, param) from None
    except Conflict as error:
        raise RequestError(error.code, str(error), param) from None
    check_servable(version, base, param)
    services.last_used.note(task.name)
    return Target(task.name, task.settings, version)


def check_servable(version: Version, base: ServedBase, param: str) -> None:
    """Refuse a version that was made for another base."""
    if version.base_fingerprint != base.facts.fingerprint:
        message = (
            f"version {version.number} of task '{version.task}' was made for another base "
            f"({version.base_fingerprint[:12]}…) than this server's ({base.facts.fingerprint[:12]}…); upload one for it"
        )
        raise RequestError("base_mismatch", message, param)


def not_found(error: NotFound, param: str | None = None) -> RequestError:
    """The store's word in the contract's: OpenAI's routes say `model_not_found`."""
    code = "model_not_found" if param == "model" and error.what == "task" else f"{error.what}_not_found"
    return RequestError(code, str(error), param)
