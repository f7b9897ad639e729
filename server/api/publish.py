"""From a folder of files to a task's version: checked by the engine, stored, visible, activated.

Uploads and whoever publishes at start-up go the same way. It also changes a task's settings, which are checked here.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec

from adapters_store import (
    ID_PATTERN,
    FileRecord,
    NewVersionFacts,
    NotFound,
    Task,
    TaskSettings,
    Version,
    adapter_digest,
    publish_files,
)
from server.api.derived import write_task_index, write_token_ids
from server.api.sampling import plan_sampling
from server.api.schemas.tasks import TaskBody
from server.api.services import Services
from server.api.templates import PromptTemplate
from server.api.uploads import ACCEPTED_FILES, CONFIG_FILE
from server.engine.protocol import AdapterFacts
from server.errors import AdapterError, RequestError

_ID = re.compile(ID_PATTERN)


@dataclass(frozen=True)
class CheckedUpload:
    """What a dry run finds out."""

    digest: str
    facts: AdapterFacts
    bytes: int  # of all files
    warnings: list[str]


def check_task_name(services: Services, name: str) -> None:
    """Refuse a name that a task cannot have."""
    if not _ID.fullmatch(name):
        message = f"task: '{name}' is no task id: letters, digits and ._:- (at most 128), a letter or digit first"
        raise RequestError("invalid_request", message, "task")
    if name == services.require_base().facts.id:
        raise RequestError("reserved", f"task: '{name}' is the base's own id; choose another name", "task")


async def check_staged(services: Services, folder: Path) -> CheckedUpload:
    """Have the files of a folder checked; nothing is kept. Raises `AdapterError`."""
    base = services.require_base()
    engine = base.engine
    await write_token_ids(base, folder)
    try:
        async with asyncio.timeout(services.settings.request_timeout):
            facts = await engine.inspect(uuid.uuid4().hex, str(folder))
    except TimeoutError:
        raise RequestError("deadline_exceeded", "the check of the files took too long") from None
    digest, size = await asyncio.to_thread(_identify, folder)
    return CheckedUpload(digest, facts, size, [*facts.warnings, *_base_warnings(folder, services)])


def task_names(services: Services, task: str, facts: AdapterFacts) -> list[str]:
    """The tasks that an upload to `task` gives: itself, or `task:0`, `task:1`, … where a checkpoint holds several."""
    if facts.tasks is None:
        return [task]
    names = [f"{task}:{index}" for index in range(facts.tasks)]
    for name in names:
        check_task_name(services, name)
    return names


async def publish_staged(services: Services, task: str, folder: Path, *, activate: bool) -> list[tuple[Version, bool]]:
    """Check and publish the files of a staging folder, which are moved away; each version, and whether it is new.

    A checkpoint of several tasks gives a version of each, one after the other; publishing it again completes what was
    cut off.
    """
    checked = await check_staged(services, folder)
    names = task_names(services, task, checked.facts)
    if checked.facts.tasks is None:
        return [await _publish(services, task, folder, checked, activate=activate)]
    published = []
    for index, name in enumerate(names):
        with services.blobs.staging() as own:
            await asyncio.to_thread(_copy_files, folder, own)
            await asyncio.to_thread(write_task_index, own, index)
            published.append(await _publish(services, name, own, checked, activate=activate))
    return published


async def _publish(
    services: Services, task: str, folder: Path, checked: CheckedUpload, *, activate: bool
) -> tuple[Version, bool]:
    facts = NewVersionFacts(
        method=checked.facts.method,
        parameters=checked.facts.parameters,
        bytes=checked.bytes,
        virtual_tokens=checked.facts.virtual_tokens,
        rank=checked.facts.rank,
        base_fingerprint=services.require_base().facts.fingerprint,
        warnings=checked.warnings,
    )
    published = await publish_files(services.index, services.blobs, task, folder, facts, activate=activate)
    await services.directory.refresh([task])
    return published


async def publish_folder(services: Services, task: str, source: Path, *, activate: bool) -> list[tuple[Version, bool]]:
    """Publish a folder of this machine just as an upload of its files would be; the folder stays as it is."""
    check_task_name(services, task)
    with services.blobs.staging() as folder:
        if not (source / CONFIG_FILE).is_file():
            raise AdapterError("missing_file", f"{CONFIG_FILE} is missing in {source}", "files")
        for name in ACCEPTED_FILES:
            if (source / name).is_file():
                await asyncio.to_thread(shutil.copyfile, source / name, folder / name)
        return await publish_staged(services, task, folder, activate=activate)


async def put_settings(services: Services, name: str, changes: TaskBody) -> Task:
    """Create the task, or change the settings that are given; null resets one. Raises `RequestError`."""
    check_task_name(services, name)
    if changes.template is not None:
        PromptTemplate(changes.template, param="template")
    defaults = {} if changes.defaults is None else changes.defaults.given()
    plan_sampling({}, defaults, services.require_base().facts)
    try:
        old = (await services.index.get_task(name)).settings
    except NotFound:
        old = TaskSettings()
    given = {
        "description": changes.description or "",
        "template": changes.template,
        "defaults": defaults,
        "labels": changes.labels or {},
    }
    named = {field: given[field] for field in changes.model_fields_set}
    task = await services.index.put_task(name, msgspec.structs.replace(old, **named))
    await services.directory.refresh([name])
    return task


def _copy_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)


def _base_warnings(folder: Path, services: Services) -> list[str]:
    """A base of another name is no fault: folders are renamed, and the shapes have been checked."""
    config = msgspec.json.decode((folder / "adapter_config.json").read_bytes())
    name, own = config.get("base_model_name_or_path"), services.require_base().facts.id
    if not isinstance(name, str) or Path(name).name == Path(own).name:
        return []
    return [f"base_model_name_or_path is '{name}', this server's base is '{own}'"]


def _identify(folder: Path) -> tuple[str, int]:
    """The adapter's digest, and the size of all files in bytes."""
    records = {}
    for path in folder.iterdir():
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        records[path.name] = FileRecord(sha256, path.stat().st_size)
    return adapter_digest(records), sum(record.size for record in records.values())
