"""Changes of a task's settings: checked, and never lost among those of others.

Settings are read, changed and written again with the revision that was read: if somebody else's change came between,
the index refuses, and it is done again from their settings. A caller that sends a revision (`If-Match`) is refused
instead (`changed_meanwhile`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from adapters_store import Conflict, CustomizationLimits, NotFound, Task, TaskSettings
from server.api.caller import Caller
from server.api.publish import check_task_name
from server.api.sampling import plan_sampling
from server.api.schemas.tasks import CustomizationBody, TaskBody
from server.api.services import Services
from server.api.templates import PromptTemplate
from server.api.tenancy import own
from server.errors import RequestError

_MAX_REVISION_DIGITS = 18  # no settings were changed that often; Python refuses to read thousands of digits
_ATTEMPTS = 16  # each that fails is another caller's success


async def put_settings(
    services: Services, caller: Caller, name: str, changes: TaskBody, *, revision: int | None = None
) -> Task:
    """Create the caller's task, or change the settings that are given; null resets one. Raises `RequestError`.

    With `revision` (0: there is no task) only those settings are changed.
    """
    check_task_name(services, name)
    given = _checked(services, changes)
    task_name = own(caller, name)
    for attempt in range(1, _ATTEMPTS + 1):
        old, found = await _read(services, task_name)
        if revision is not None and revision != found:
            message = f"the settings of task '{name}' have revision {found}, not {revision}; read them again"
            raise RequestError("changed_meanwhile", message, "If-Match")
        settings = msgspec.structs.replace(old, **given)
        if settings.public != old.public:
            caller.require("admin")
        if settings.pinned and not old.pinned:
            caller.require_operator()  # the adapter memory is every tenant's
            await _check_pin(services, task_name)
        try:
            task = await services.index.put_task(task_name, settings, expected_revision=found, change=caller.change)
        except Conflict as error:
            if error.code != "changed_meanwhile" or revision is not None or attempt == _ATTEMPTS:
                raise
        else:
            await services.directory.refresh([task_name])
            return task
    raise AssertionError("the last attempt returns or raises")


def revision_of(if_match: str | None) -> int | None:
    """The revision that a caller's `If-Match` asks for, None without one. Raises `RequestError` for one that no
    settings can have."""
    if if_match is None:
        return None
    text = if_match.strip().strip('"')
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_REVISION_DIGITS):
        message = f"If-Match is {if_match[:40]!r}; send a task's revision, as its ETag has it"
        raise RequestError("invalid_request", message, "If-Match")
    return int(text)


def _checked(services: Services, changes: TaskBody) -> dict[str, Any]:
    """The settings that are given, by name, as the index holds them."""
    base = services.require_base()
    if changes.template is not None:
        PromptTemplate(changes.template, param="template")
    defaults = {} if changes.defaults is None else changes.defaults.given()
    plan_sampling({}, defaults, base.facts)
    given = {
        "description": changes.description or "",
        "template": changes.template,
        "defaults": defaults,
        "labels": changes.labels or {},
        "public": bool(changes.public),
        "pinned": bool(changes.pinned),
        "customization": _limits(changes.customization, {method.name for method in base.facts.methods}),
    }
    return {field: given[field] for field in changes.model_fields_set}


def _limits(body: CustomizationBody | None, known: set[str]) -> CustomizationLimits | None:
    if body is None:
        return None
    if unknown := set(body.methods or ()) - known:
        message = f"customization.methods: there is no method '{min(unknown)}'; GET /v1/methods lists them"
        raise RequestError("invalid_request", message, "customization.methods")
    return CustomizationLimits(**body.model_dump())


async def _read(services: Services, task_name: str) -> tuple[TaskSettings, int]:
    try:
        task = await services.index.get_task(task_name)
    except NotFound:
        return TaskSettings(), 0
    return task.settings, task.settings_revision


async def _check_pin(services: Services, task_name: str) -> None:
    [state] = await services.index.read_tasks([task_name])
    active = None if state is None else state.active
    await services.pins.check(services.require_base().facts, task_name, 0 if active is None else active.parameters)
