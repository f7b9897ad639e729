"""From the names in a request to what serves it: the base, a task's version, and the user's customization over it.

What is resolved is pinned: a request ends on the version and the customization that it started on. Where a task has a
canary, the user decides who gets it, else the request's id. A customization belongs to the task, whichever of its
versions is asked for; one that cannot be looked up is an error, never the task alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters_store import Conflict, Customization, NotFound, Task, TaskSettings, Version
from server.api.adapter_refs import adapter_of
from server.api.caller import Caller
from server.api.services import ServedBase, Services
from server.api.tenancy import id_of, is_own, own, visible
from server.engine.protocol import AdapterRef
from server.errors import RequestError

BASE_LABEL = "base"  # of the metrics
_ATTEMPTS = 5  # each that fails is a task that was deleted and made anew in between


@dataclass(frozen=True)
class Target:
    """What a request runs under."""

    task: str | None  # its scoped name; None: the base alone
    settings: TaskSettings
    version: Version | None
    user: str | None = None  # as the request says it
    customization: Customization | None = None
    is_public: bool = False  # another tenant's task, which is public

    @property
    def label(self) -> str:
        """For the metrics."""
        return BASE_LABEL if self.task is None else self.task

    @property
    def layers(self) -> tuple[Version | Customization, ...]:
        """What is applied, in order: the task's version, then what the user laid over it, or that alone."""
        version, customization = self.version, self.customization
        if version is None:
            return ()
        if customization is None:
            return (version,)
        return (customization,) if customization.mode == "replace" else (version, customization)

    @property
    def stack(self) -> tuple[AdapterRef, ...]:
        """The adapters, task's first."""
        return tuple(adapter_of(layer) for layer in self.layers)

    @property
    def virtual_tokens(self) -> int:
        """Of the stack."""
        return sum(layer.virtual_tokens for layer in self.layers)

    @property
    def medley(self) -> dict[str, Any]:
        """The response's `medley` block: what was really applied. `public` is there where the task is another tenant's:
        the caller's own may have had the same name and numbers."""
        shared = {"public": True} if self.is_public else {}
        return {
            "task": None if self.task is None else id_of(self.task),
            "version": None if self.version is None else self.version.number,
            "user": self.user,
            "customization": None if self.customization is None else _applied(self.customization),
            "methods": [layer.method for layer in self.layers],
            **shared,
        }


async def resolve(
    services: Services, base: ServedBase, caller: Caller, name: str, *, param: str, user: str | None
) -> Target:
    """What `name` stands for to the caller and their `user`; `param` is the field that the name came in.

    Raises `RequestError`: `model_not_found` (or `task_not_found`, as `param` says), `version_not_found`,
    `no_active_version`, `base_mismatch`; `StoreUnavailable` for what cannot be looked up now.
    """
    if name == base.facts.id:
        return Target(None, TaskSettings(), None, user)
    scoped_user = None if user is None else own(caller, user, what="user")
    try:
        task, version, customization = await _look_up(services, caller, name, scoped_user)
    except NotFound as error:
        raise not_found(error, param) from None
    except Conflict as error:
        raise RequestError(error.code, str(error), param) from None
    is_public = not is_own(caller, task.name)
    target = Target(task.name, task.settings, version, user, customization, is_public)
    for layer in target.layers:
        check_servable(layer, base, param if isinstance(layer, Version) else "user")
    services.last_used.note(task.name)
    if customization is not None:
        services.metrics.customized(customization.mode)
    return target


async def _look_up(
    services: Services, caller: Caller, name: str, user: str | None
) -> tuple[Task, Version, Customization | None]:
    """The task, its version and the (scoped) user's customization, all of one task: where the index has it no longer,
    or another one of its name, and the feed has not told yet, it is read anew."""
    for attempt in range(1, _ATTEMPTS + 1):
        pick = caller.request_id if user is None else user
        task, version = await services.directory.resolve(visible(services, caller, name), pick=pick)
        if user is None:
            return task, version, None
        try:
            return task, version, await services.customizations.get(user, task.name, created=task.created)
        except Conflict:
            if attempt == _ATTEMPTS:
                raise
            await services.directory.refresh([task.name])
    raise AssertionError("the last attempt returns or raises")


def check_servable(layer: Version | Customization, base: ServedBase, param: str) -> None:
    """Refuse what was made for another base."""
    if layer.base_fingerprint != base.facts.fingerprint:
        message = (
            f"{name_of(layer)} was made for another base ({layer.base_fingerprint[:12]}…) than this server's "
            f"({base.facts.fingerprint[:12]}…); upload one for it"
        )
        raise RequestError("base_mismatch", message, param)


def name_of(layer: Version | Customization) -> str:
    """What a sentence calls it."""
    if isinstance(layer, Version):
        return f"version {layer.number} of task '{id_of(layer.task)}'"
    return f"the customization of user '{id_of(layer.user)}' for task '{id_of(layer.task)}'"


def naming(error: RequestError, layers: Sequence[Version | Customization]) -> RequestError:
    """The engine's error of a damaged blob with whose of these it is; another error as it is."""
    if error.code == "version_corrupt":
        for layer in layers:
            if any(record.sha256 in error.message for record in layer.files.values()):
                return RequestError(error.code, f"{name_of(layer)}: {error.message}", error.param)
    return error


def not_found(error: NotFound, param: str | None = None) -> RequestError:
    """The store's word in the contract's: OpenAI's routes say `model_not_found`."""
    code = "model_not_found" if param == "model" and error.what == "task" else f"{error.what}_not_found"
    return RequestError(code, str(error), param)


def _applied(customization: Customization) -> dict[str, Any]:
    return {
        "mode": customization.mode,
        "digest": customization.digest,
        "method": customization.method,
        "made_against": customization.made_against,
        "created": customization.created,
    }
