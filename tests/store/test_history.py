"""The history: every change of a task once, with who made it, also after the task is gone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from adapters_store import Canary, Change, Conflict, HistoryEntry, NotFound, RedisIndex, TaskSettings
from tests.store.samples import new_customization, new_version

pytestmark = pytest.mark.anyio


def told(entries: list[HistoryEntry]) -> list[tuple[str, dict[str, Any]]]:
    """Oldest first, without who and when."""
    return [(entry.action, entry.detail) for entry in reversed(entries)]


async def test_each_change_is_told_with_who_made_it(index: RedisIndex) -> None:
    def by(number: int) -> Change:
        return Change(f'key"{number}', f"request/{number}é")

    await index.put_task("t", TaskSettings(description="d\n{}"), change=by(0))
    await index.publish("t", new_version("a"), activate=True, change=by(1))
    await index.publish("t", new_version("b"), activate=False, change=by(2))
    await index.set_canary("t", Canary(2, 12.5), change=by(3))
    await index.set_canary("t", None, change=by(4))
    await index.activate("t", 2, change=by(5))
    await index.rollback("t", change=by(6))
    await index.delete_version("t", 2, change=by(7))
    await index.delete_task("t", change=by(8))
    entries = await index.history("t", 100)
    assert told(entries) == [
        ("task_put", {"revision": 1, "settings": {"description": "d\n{}"}}),
        ("version_published", {"version": 1, "digest": "a", "activated": True}),
        ("version_published", {"version": 2, "digest": "b", "activated": False}),
        ("canary_set", {"version": 2, "percent": 12.5}),
        ("canary_set", {"version": None, "percent": None}),
        ("version_activated", {"version": 2, "previous": 1}),
        ("task_rolled_back", {"version": 1, "previous": 2}),
        ("version_deleted", {"version": 2}),
        ("task_deleted", {}),
    ]
    assert [Change(entry.actor, entry.request_id) for entry in reversed(entries)] == [by(i) for i in range(9)]
    assert [entry.id for entry in entries] == list(range(9, 0, -1))
    assert all(later.time >= earlier.time for later, earlier in pairwise(entries))


async def test_a_publication_that_makes_the_task_tells_both(index: RedisIndex) -> None:
    await index.publish("t", new_version("a"), activate=False)
    await index.publish("t", new_version("a"), activate=True)
    assert told(await index.history("t", 9)) == [
        ("task_put", {"revision": 1, "settings": {}}),
        ("version_published", {"version": 1, "digest": "a", "activated": False}),
        ("version_activated", {"version": 1, "previous": None}),
    ]


async def test_what_changed_nothing_or_was_refused_is_not_told(index: RedisIndex) -> None:
    await index.publish("t", new_version("a"), activate=True)
    before = await index.history("t", 9)
    await index.publish("t", new_version("a"), activate=True)
    await index.activate("t", 1)
    await index.set_canary("t", None)
    for call in (
        index.put_task("t", TaskSettings(), expected_revision=9),
        index.activate("t", 9),
        index.rollback("t"),
        index.set_canary("t", Canary(1, 1.0)),
        index.delete_version("t", 1),
    ):
        with pytest.raises((Conflict, NotFound)):
            await call
    assert await index.history("t", 9) == before
    assert await index.history("none", 9) == []


async def test_the_history_goes_on_where_a_deleted_tasks_name_is_used_again(index: RedisIndex) -> None:
    for _ in range(2):
        await index.put_task("t", TaskSettings())
        await index.delete_task("t")
    entries = await index.history("t", 9)
    assert [(entry.id, entry.action) for entry in entries] == [
        (4, "task_deleted"),
        (3, "task_put"),
        (2, "task_deleted"),
        (1, "task_put"),
    ]


async def test_it_is_read_in_pages_that_changes_meanwhile_do_not_move(index: RedisIndex) -> None:
    for i in range(5):
        await index.put_task("t", TaskSettings(description=f"{i}"))
    first = await index.history("t", 2)
    await index.put_task("t", TaskSettings(description="new"))
    rest = await index.history("t", 9, before=first[-1].id)
    assert [entry.id for entry in [*first, *rest]] == [5, 4, 3, 2, 1]
    assert await index.history("t", 9, before=1) == []
    assert [entry.id for entry in await index.history("t", 2, before=100)] == [6, 5]
    assert await index.history("none", 2, before=3) == []


async def test_it_keeps_the_newest_thousand(index: RedisIndex) -> None:
    for _ in range(1003):
        await index.put_task("t", TaskSettings())
    entries = await index.history("t", 2000)
    assert [entry.id for entry in entries] == list(range(1003, 3, -1))
    assert [entry.id for entry in await index.history("t", 2, before=6)] == [5, 4]


async def test_users_changes_are_kept_apart_so_that_they_push_no_others_out(index: RedisIndex) -> None:
    await index.put_task("t", TaskSettings())
    before = await index.history("t", 9)
    change = Change("key", "request")
    await index.put_customization("u", "t", new_customization("a"), change=change)
    await index.delete_customization("u", "t", change=change)
    await index.put_customization("u", "t", new_customization("b"), change=change)
    await index.delete_user("u", change=change)
    assert await index.history("t", 9) == before
    entries = await index.customization_history(9)
    digest = [new_customization(text).digest for text in "ab"]
    assert told(entries) == [
        ("customized", {"user": "u", "task": "t", "mode": "compose", "digest": digest[0]}),
        ("uncustomized", {"user": "u", "task": "t"}),
        ("customized", {"user": "u", "task": "t", "mode": "compose", "digest": digest[1]}),
        ("user_deleted", {"user": "u", "customizations": 1}),
    ]
    assert {(entry.actor, entry.request_id) for entry in entries} == {("key", "request")}
    assert [entry.id for entry in await index.customization_history(1, before=3)] == [2]
