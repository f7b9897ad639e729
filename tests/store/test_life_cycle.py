"""Canary and rollback: what each leaves behind, what is refused, and which requests get the canary."""

from __future__ import annotations

import asyncio

import pytest

from adapters_store import Canary, Conflict, NotFound, RedisIndex, TaskDirectory, TaskSettings
from tests.store.samples import eventually, new_version

pytestmark = pytest.mark.anyio


@pytest.fixture
async def task(index: RedisIndex) -> str:
    """A task whose versions 1, 2 and 3 were active in turn."""
    for text in "abc":
        await index.publish("t", new_version(text), activate=True)
    return "t"


async def test_a_canary_is_set_replaced_and_cleared(index: RedisIndex, task: str) -> None:
    assert (await index.set_canary(task, Canary(1, 12.5))).canary == Canary(1, 12.5)
    [state] = await index.read_tasks([task])
    assert state is not None
    assert (state.active, state.canary) == (await index.get_version(task, 3), await index.get_version(task, 1))
    assert (await index.set_canary(task, Canary(2, 100.0))).canary == Canary(2, 100.0)
    assert (await index.set_canary(task, None)).canary is None
    before = await index.get_task(task)
    assert await index.set_canary(task, None) == before, "clearing none changes nothing"


async def test_a_canary_is_an_existing_version_that_is_not_active(index: RedisIndex, task: str) -> None:
    with pytest.raises(Conflict) as refused:
        await index.set_canary(task, Canary(3, 10.0))
    assert refused.value.code == "version_active"
    for name, canary in ((task, Canary(9, 10.0)), ("none", Canary(1, 10.0)), ("none", None)):
        with pytest.raises(NotFound):
            await index.set_canary(name, canary)
    await index.publish("u", new_version("a"), activate=False)
    with pytest.raises(Conflict) as refused:
        await index.set_canary("u", Canary(1, 10.0))
    assert refused.value.code == "no_active_version"


async def test_a_canary_cannot_be_deleted(index: RedisIndex, task: str) -> None:
    await index.set_canary(task, Canary(1, 10.0))
    with pytest.raises(Conflict) as refused:
        await index.delete_version(task, 1)
    assert refused.value.code == "version_canary"
    await index.set_canary(task, None)
    await index.delete_version(task, 1)


@pytest.mark.parametrize("way", ["activate", "publish", "rollback"])
async def test_the_canary_that_becomes_active_is_none_any_longer(index: RedisIndex, task: str, way: str) -> None:
    await index.set_canary(task, Canary(2, 10.0))
    if way == "activate":
        await index.activate(task, 1)
        assert (await index.get_task(task)).canary == Canary(2, 10.0), "another version's activation leaves it"
        await index.activate(task, 2)
    elif way == "publish":
        await index.publish(task, new_version("b"), activate=True)
    else:
        await index.rollback(task)
    found = await index.get_task(task)
    assert (found.active, found.canary) == (2, None)


async def test_rolling_back_goes_further_back_each_time_and_ends_with_a_refusal(index: RedisIndex, task: str) -> None:
    assert [(await index.rollback(task)).active for _ in range(2)] == [2, 1]
    with pytest.raises(Conflict) as refused:
        await index.rollback(task)
    assert refused.value.code == "no_previous"
    assert (await index.get_task(task)).active == 1
    with pytest.raises(NotFound):
        await index.rollback("none")


async def test_rolling_back_skips_deleted_versions_and_what_was_rolled_back_from(index: RedisIndex, task: str) -> None:
    await index.delete_version(task, 2)
    rolled_back = await index.rollback(task)
    assert (rolled_back.active, rolled_back.previous) == (1, None)
    await index.activate(task, 3)
    assert (await index.rollback(task)).active == 1
    await index.delete_version(task, 3)  # neither active nor needed by anything


async def test_rollbacks_at_once_go_back_one_version_each(index: RedisIndex, task: str) -> None:
    results = await asyncio.gather(*(index.rollback(task) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, Conflict) for result in results) == 3
    assert (await index.get_task(task)).active == 1


async def test_a_canary_is_mirrored_and_selected_by_its_name(
    index: RedisIndex, directory: TaskDirectory, task: str
) -> None:
    await index.set_canary(task, Canary(1, 100.0))
    await eventually(lambda: (found := directory.get(task)) is not None and found.canary is not None)
    assert (await directory.resolve("t@canary"))[1].number == 1
    assert (await directory.resolve("t", pick="anybody"))[1].number == 1
    assert (await directory.resolve("t"))[1].number == 3, "who cannot be picked gets the active version"
    await index.set_canary(task, None)
    await eventually(lambda: (found := directory.get(task)) is not None and found.canary is None)
    with pytest.raises(NotFound):
        await directory.resolve("t@canary")


async def test_a_canary_has_its_percent_of_the_users_always_the_same_ones(
    index: RedisIndex, directory: TaskDirectory, task: str
) -> None:
    async def picked(percent: float) -> set[str]:
        await index.set_canary(task, Canary(1, percent))
        await directory.refresh([task])
        users = [f"user-{i}" for i in range(4000)]
        return {user for user in users if (await directory.resolve(task, pick=user))[1].number == 1}

    few = await picked(5.0)
    assert 140 < len(few) < 260  # four standard deviations around 200
    assert await picked(5.0) == few
    many = await picked(50.0)
    assert 1870 < len(many) < 2130
    assert few < many, "who had it at 5 percent keeps it at 50"
    assert len(await picked(0.0)) == 0


async def test_users_of_one_tasks_canary_are_not_those_of_anothers(index: RedisIndex, directory: TaskDirectory) -> None:
    found = []
    for name in ("t", "u"):
        for text in "ab":
            await index.publish(name, new_version(text), activate=text == "a")
        await index.set_canary(name, Canary(2, 50.0))
        await directory.refresh([name])
        users = [f"{i}" for i in range(200)]
        found.append({user for user in users if (await directory.resolve(name, pick=user))[1].number == 2})
    assert 20 < len(found[0] & found[1]) < 80


async def test_a_canary_and_its_state_stay_through_a_change_of_settings(index: RedisIndex, task: str) -> None:
    await index.set_canary(task, Canary(1, 10.0))
    assert (await index.put_task(task, TaskSettings(description="new"))).canary == Canary(1, 10.0)


async def test_a_version_of_another_base_is_put_before_requests_by_a_caller_of_that_base_alone(
    index: RedisIndex,
) -> None:
    for text, base in (("a", "old"), ("b", "new"), ("c", "new")):
        await index.publish("t", new_version(text, base=base), activate=text != "c")
    before, seen = await index.get_task("t"), await index.history("t", 100)
    for refused in (
        index.activate("t", 1, base="new"),
        index.set_canary("t", Canary(1, 10.0), base="new"),
        index.rollback("t", base="new"),
    ):
        with pytest.raises(Conflict, match="another base") as mismatch:
            await refused
        assert mismatch.value.code == "base_mismatch"
    assert (await index.get_task("t"), await index.history("t", 100)) == (before, seen)
    assert (await index.set_canary("t", Canary(3, 10.0), base="new")).canary == Canary(3, 10.0)
    assert (await index.rollback("t", base="old")).active == 1
    assert (await index.activate("t", 3, base="new")).active == 3
    assert (await index.activate("t", 1)).active == 1
