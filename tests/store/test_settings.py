"""Settings: revisions, changes at once, public names, tenants' tasks of the same name."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from adapters_store import (
    Conflict,
    CustomizationLimits,
    NotFound,
    RedisIndex,
    TaskDirectory,
    TaskSettings,
    id_of,
    scoped,
    tenant_of,
)
from tests.store.samples import new_version

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("tenant", "name"), [("", "t"), ("acme", "t"), ("acme", "a:b@3")])
def test_a_scoped_name_is_taken_apart_into_what_it_was_made_of(tenant: str, name: str) -> None:
    made = scoped(tenant, name)
    assert (tenant_of(made), id_of(made)) == (tenant, name)


async def test_all_settings_are_read_back(index: RedisIndex) -> None:
    limits = CustomizationLimits(methods=["lora"], max_virtual_tokens=5, max_parameters=6, max_bytes=7)
    settings = TaskSettings("d", "{{ input }}", {"top_p": 0.5}, {"a": "b"}, True, True, limits)
    assert (await index.put_task("t", settings)).settings == settings


async def test_every_change_of_the_settings_is_a_new_revision_also_after_a_deletion(index: RedisIndex) -> None:
    revisions = [(await index.put_task("t", TaskSettings(description=text))).settings_revision for text in "ab"]
    await index.publish("t", new_version("a"), activate=True)
    revisions.append((await index.get_task("t")).settings_revision)
    await index.delete_task("t")
    await index.publish("t", new_version("a"), activate=True)
    revisions.append((await index.get_task("t")).settings_revision)
    assert revisions == [1, 2, 2, 3]


async def test_settings_that_were_changed_meanwhile_are_not_overwritten(index: RedisIndex) -> None:
    await index.put_task("t", TaskSettings(description="a"), expected_revision=0)
    for stale in (0, 2):
        with pytest.raises(Conflict) as refused:
            await index.put_task("t", TaskSettings(description="b"), expected_revision=stale)
        assert refused.value.code == "changed_meanwhile"
    with pytest.raises(Conflict):
        await index.put_task("new", TaskSettings(), expected_revision=1)
    assert (await index.put_task("t", TaskSettings(description="b"), expected_revision=1)).settings.description == "b"
    with pytest.raises(NotFound):
        await index.get_task("new")


async def test_of_changes_at_once_that_read_and_write_none_is_lost(index: RedisIndex) -> None:
    await index.put_task("t", TaskSettings())

    async def add_label(label: str) -> None:
        while True:
            task = await index.get_task("t")
            settings = msgspec.structs.replace(task.settings, labels={**task.settings.labels, label: "x"})
            try:
                await index.put_task("t", settings, expected_revision=task.settings_revision)
            except Conflict:
                continue
            return

    await asyncio.gather(*(add_label(f"{i}") for i in range(8)))
    task = await index.get_task("t")
    assert sorted(task.settings.labels) == [f"{i}" for i in range(8)]
    assert task.settings_revision == 9


async def test_an_id_has_one_public_task_until_that_is_hidden_or_deleted(index: RedisIndex) -> None:
    public, hidden = TaskSettings(public=True), TaskSettings()
    await index.put_task("a/t", public)
    await index.put_task("a/t", public)  # again is fine
    for name in ("b/t", "t"):
        with pytest.raises(Conflict) as refused:
            await index.put_task(name, public)
        assert refused.value.code == "public_name_taken"
        with pytest.raises(NotFound):
            await index.get_task(name)
    await index.put_task("b/t", hidden)  # does not take away another's
    with pytest.raises(Conflict):
        await index.put_task("b/t", public)
    await index.put_task("a/t", hidden)
    await index.put_task("b/t", public)
    await index.delete_task("a/t")
    with pytest.raises(Conflict):
        await index.put_task("t", public)
    await index.delete_task("b/t")
    assert (await index.put_task("t", public)).settings.public


async def test_the_same_name_in_two_tenants_is_two_tasks(index: RedisIndex) -> None:
    names = ["t", "a/t", "b/t"]
    for name in names:
        await index.publish(name, new_version(name), activate=True)
    assert [[version.digest for version in await index.list_versions(name)] for name in names] == [[n] for n in names]
    await index.delete_task("a/t")
    assert [task.name for task in (await index.list_tasks(9))[0]] == ["t", "b/t"]


async def test_a_tenant_lists_its_own_tasks_in_pages(index: RedisIndex) -> None:
    names = ["a", "b", "b/a", "b/b", "b/c", "b0", "b:", "b./x", "c/a"]
    for name in names:
        await index.put_task(name, TaskSettings())
    for tenant in ("", "b", "b.", "c", "none"):
        found: list[str] = []
        has_more = True
        while has_more:
            page, has_more = await index.list_states(2, found[-1] if found else None, tenant=tenant)
            assert len(page) == 2 or not has_more
            found += [state.task.name for state in page]
        assert found == sorted(name for name in names if tenant_of(name) == tenant)


async def test_an_error_names_the_id_without_the_tenant(index: RedisIndex) -> None:
    with pytest.raises(NotFound, match=r"^there is no task 't'$"):
        await index.get_task("secret/t")


async def test_a_caller_means_their_own_task_else_the_public_one(index: RedisIndex, directory: TaskDirectory) -> None:
    for name in ("a/t", "b/t", "b/u", "u", "a/v"):
        await index.put_task(name, TaskSettings(public=name in ("b/t", "u")))
    await directory.refresh(["a/t", "b/t", "b/u", "u", "a/v"])
    asked = {
        ("a", "t"): "a/t",
        ("b", "t"): "b/t",
        ("c", "t@3"): "b/t@3",
        ("", "t@canary"): "b/t@canary",
        ("b", "u"): "b/u",
        ("a", "u"): "u",
        ("b", "v"): "b/v",  # another tenant's, which is not public
        ("b", "x@1"): "b/x@1",
    }
    assert {question: directory.seen_by(*question) for question in asked} == asked
    assert [task.name for task in directory.public()] == ["b/t", "u"]
    await index.put_task("b/t", TaskSettings())
    await index.put_task("a/t", TaskSettings(public=True))
    await directory.refresh(["b/t", "a/t"])
    assert directory.seen_by("c", "t") == "a/t"
    await index.delete_task("a/t")
    await directory.refresh(["a/t"])
    assert directory.seen_by("c", "t") == "c/t"
    assert [task.name for task in directory.public()] == ["u"]


async def test_pinned_tasks_are_known_after_loading_and_after_changes(
    index: RedisIndex, directory: TaskDirectory
) -> None:
    for name in ("a", "b", "c"):
        await index.put_task(name, TaskSettings(pinned=name != "b"))
    late = TaskDirectory(index)
    await late.start()
    await late.stop()
    assert [task.name for task in late.pinned()] == ["a", "c"]
    await index.put_task("a", TaskSettings())
    await index.delete_task("c")
    await directory.refresh(["a", "b", "c"])
    assert directory.pinned() == []
