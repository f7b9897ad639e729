"""From a folder of files to a task's version: checked by the engine, stored, visible, activated.

Uploads and whoever publishes at start-up go the same way. It heals damaged blobs, and the engine hears so.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from adapters_store import (
    ID_PATTERN,
    FileRecord,
    NewVersionFacts,
    NotFound,
    StoreError,
    Version,
    adapter_digest,
    on_threads,
    publish_files,
)
from server.api.caller import Caller
from server.api.derived import write_task_index, write_token_ids
from server.api.errors import request_error_of
from server.api.services import ServedBase, Services
from server.api.tenancy import own
from server.api.uploads import ACCEPTED_FILES, CONFIG_FILE
from server.engine.protocol import AdapterFacts, AdapterRef
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


async def check_staged(services: Services, folder: Path, under: AdapterRef | None = None) -> CheckedUpload:
    """Have the files of a folder checked, by themselves or to be laid over the task's adapter `under`; nothing is kept.
    Raises `AdapterError`."""
    base = services.require_base()
    engine = base.engine
    await write_token_ids(base, folder)
    try:
        async with asyncio.timeout(services.settings.request_timeout):
            facts = await engine.inspect(uuid.uuid4().hex, str(folder), under)
    except TimeoutError:
        raise RequestError("deadline_exceeded", "the check of the files took too long") from None
    digest, size = await asyncio.to_thread(_identify, folder)
    warnings = await asyncio.to_thread(_base_warnings, folder, base.facts.id)
    return CheckedUpload(digest, facts, size, [*facts.warnings, *warnings])


def task_names(services: Services, task: str, facts: AdapterFacts, task_index: int | None = None) -> list[str]:
    """The tasks that an upload to `task` gives: itself, or `task:0`, `task:1`, … where a checkpoint holds several and
    none of them was chosen by `task_index`. Raises `RequestError` for an index that it has not."""
    if task_index is not None and not task_index < (facts.tasks or 0):
        message = f"task_index: it is {task_index}, and this checkpoint holds {facts.tasks or 'no several'} tasks"
        raise RequestError("invalid_request", message, "task_index")
    if facts.tasks is None or task_index is not None:
        return [task]
    names = [f"{task}:{index}" for index in range(facts.tasks)]
    for name in names:
        check_task_name(services, name)
    return names


async def publish_staged(
    services: Services, caller: Caller, task: str, folder: Path, *, activate: bool, task_index: int | None = None
) -> list[tuple[Version, bool]]:
    """Check and publish the files of a staging folder, which are moved away, as the caller's; each version, and whether
    it is new.

    A checkpoint of several tasks gives a version of each. None is activated before all of them stand, so that what is
    cut off is served by nobody; the error says so, and publishing it again completes it.
    """
    checked = await check_staged(services, folder)
    names = task_names(services, task, checked.facts, task_index)
    if activate:
        for name in names:
            await services.pins.check_active(services.require_base().facts, own(caller, name), checked.facts.parameters)
    if names == [task]:
        if task_index is not None:
            await asyncio.to_thread(write_task_index, folder, task_index)
        return [await _publish(services, caller, task, folder, checked, activate=activate)]
    published: list[tuple[Version, bool]] = []
    activated = 0
    try:
        for index, name in enumerate(names):
            async with on_threads(services.blobs.staging()) as part:
                await asyncio.to_thread(_copy_files, folder, part)
                await asyncio.to_thread(write_task_index, part, index)
                published.append(await _publish(services, caller, name, part, checked, activate=False))
        for version, _ in published if activate else []:
            await services.index.activate(version.task, version.number, change=caller.change)
            await services.directory.refresh([version.task])
            activated += 1
    except (RequestError, StoreError) as error:
        told = request_error_of(error) if isinstance(error, StoreError) else error
        told.message += (
            f"; of the {len(names)} tasks of this upload {len(published)} have their version and {activated} were told "
            "to answer with it; the same upload again completes it"
        )
        if told is error:
            raise
        raise told from error
    return published


def facts_of(checked: CheckedUpload, base: ServedBase) -> NewVersionFacts:
    """What the index is told of an upload."""
    return NewVersionFacts(
        method=checked.facts.method,
        parameters=checked.facts.parameters,
        bytes=checked.bytes,
        virtual_tokens=checked.facts.virtual_tokens,
        rank=checked.facts.rank,
        base_fingerprint=base.facts.fingerprint,
        warnings=checked.warnings,
    )


async def _publish(
    services: Services, caller: Caller, task: str, folder: Path, checked: CheckedUpload, *, activate: bool
) -> tuple[Version, bool]:
    base = services.require_base()
    facts = facts_of(checked, base)
    name = own(caller, task)
    await check_room(services, caller, task, checked)
    version, is_new = await publish_files(
        services.index, services.blobs, name, folder, facts, activate=activate, change=caller.change
    )
    base.engine.healed([record.sha256 for record in version.files.values()])
    await services.directory.refresh([name])
    return version, is_new


async def check_room(services: Services, caller: Caller, task: str, checked: CheckedUpload) -> None:
    """Refuse an upload that the caller's quota has no room for; what the task has already needs none."""

    async def there_already() -> int:
        with suppress(NotFound):
            base = services.require_base().facts.fingerprint
            versions = await services.index.list_versions(own(caller, task))
            if any((found.digest, found.base_fingerprint) == (checked.digest, base) for found in versions):
                return checked.bytes
        return 0

    await services.quotas.check_room(caller, checked.bytes, there_already)


async def publish_folder(services: Services, task: str, source: Path, *, activate: bool) -> list[tuple[Version, bool]]:
    """Publish a folder of this machine just as an upload of its files would be, for the default tenant; the folder
    stays as it is."""
    check_task_name(services, task)
    async with on_threads(services.blobs.staging()) as folder:
        if not (source / CONFIG_FILE).is_file():
            raise AdapterError("missing_file", f"{CONFIG_FILE} is missing in {source}", "files")
        for name in ACCEPTED_FILES:
            if (source / name).is_file():
                await asyncio.to_thread(shutil.copyfile, source / name, folder / name)
        return await publish_staged(services, Caller(), task, folder, activate=activate)


def _copy_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)


def _base_warnings(folder: Path, own: str) -> list[str]:
    """A base of another name is no fault: folders are renamed, and the shapes have been checked."""
    config = msgspec.json.decode((folder / "adapter_config.json").read_bytes())
    name = config.get("base_model_name_or_path")
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
