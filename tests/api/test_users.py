"""Users' customizations: what is laid over a task, how, by whom, and what is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters_store import GarbageCollector, PrivateRedis
from server.engine.protocol import AdapterFacts, BaseFacts, MethodEntry
from tests.api.conftest import BASE_ID, Scripted, configuration, folder_files
from tests.api.fake_engine import FACTS, FakeEngine
from tests.api.keyed import error_of, keyed
from tests.api.server_thread import ServerThread
from tests.harness import NEAR_TIE
from tests.reference.stacked import Stacked
from tests.store.samples import new_version

Files = list[tuple[str, tuple[str, bytes]]]
TEXT = {"input": "x", "max_tokens": 2}
PROMPT = [70, 9, 133, 14]
MAX_TOKENS = 12
numbers = count()


@pytest.fixture(scope="session")
def files(adapter_folders: dict[str, Path]) -> dict[str, Files]:
    return {method: folder_files(folder) for method, folder in adapter_folders.items()}


@pytest.fixture
def user() -> str:
    """One who has nothing yet."""
    return f"user-{next(numbers)}"


def lay(http: httpx.Client, user: str, task: str, files: Files, **params: Any) -> dict[str, Any]:
    response = http.put(f"/v1/users/{user}/tasks/{task}", files=files, params=params)
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


def ask(http: httpx.Client, model: str, user: str | None, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    given = {} if user is None else {"user": user}
    response = http.post("/v1/completions", json={**body, "return_token_ids": True, **given, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def tokens_of(answer: dict[str, Any]) -> list[int]:
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize("mode", ["compose", "replace"])
@pytest.mark.parametrize(
    ("of_task", "of_user"),
    [("prompt", "lora"), ("lora", "prompt"), ("ia3", "lora"), ("prefix", "ia3"), ("prompt", "prefix")],
)
def test_a_customization_gives_what_the_definition_of_its_stack_gives(
    http: httpx.Client,
    tasks: dict[str, str],
    files: dict[str, Files],
    adapter_folders: dict[str, Path],
    base_folder: Path,
    user: str,
    of_task: str,
    of_user: str,
    mode: str,
) -> None:
    task = tasks[of_task]
    made = lay(http, user, task, files[of_user], mode=mode)
    answer = ask(http, task, user)
    applied = [of_task, of_user] if mode == "compose" else [of_user]
    names = {"prompt": "prompt_tuning", "prefix": "prefix_tuning"}
    medley = answer["medley"]
    assert medley["methods"] == [names.get(method, method) for method in applied]
    assert (medley["task"], medley["version"], medley["user"]) == (task, 1, user)
    assert medley["customization"] == {
        name: made[name] for name in ("mode", "digest", "method", "made_against", "created")
    }
    virtual = {"prompt": 5, "prefix": 6}
    details = answer["usage"]["prompt_tokens_details"]
    assert details["virtual_tokens"] == sum(virtual.get(method, 0) for method in applied)

    tokens = tokens_of(answer)
    base = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager").eval()
    logits = Stacked(base, [adapter_folders[method] for method in applied]).logits([*PROMPT, *tokens])
    best = logits[len(PROMPT) - 1 : -1].topk(2)
    compared = 0
    for token, values, likeliest in zip(tokens, best.values, best.indices, strict=True):
        if float(values[0] - values[1]) < NEAR_TIE:
            break
        assert token == int(likeliest[0])
        compared += 1
    assert compared > MAX_TOKENS // 2
    assert tokens_of(ask(http, task, None)) == tokens_of(ask(http, task, f"not-{user}"))
    assert not torch.isnan(logits).any()


def test_every_generating_call_applies_it(
    http: httpx.Client, tasks: dict[str, str], files: dict[str, Files], user: str
) -> None:
    task = tasks["lora"]
    lay(http, user, task, files["prompt"])
    chat = {"model": task, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    calls: dict[str, dict[str, Any]] = {
        "/v1/completions": {"model": task, "prompt": "x", "max_tokens": 2},
        "/v1/chat/completions": chat,
        f"/v1/tasks/{task}/generate": TEXT,
        f"/v1/tasks/{task}@1/generate": TEXT,
        f"/v1/tasks/{task}/score": {"input": "x", "choices": ["a", "b"]},
    }
    for path, body in calls.items():
        medley = http.post(path, json={**body, "user": user}).json()["medley"]
        assert (medley["methods"], medley["user"]) == (["lora", "prompt_tuning"], user), path
        assert http.post(path, json=body).json()["medley"]["customization"] is None, path
    items = [{"task": task, **TEXT, "user": user}, {"task": task, **TEXT}]
    first, second = http.post("/v1/generate", json={"requests": items}).json()["results"]
    assert first["medley"]["methods"] == ["lora", "prompt_tuning"]
    assert second["medley"]["methods"] == ["lora"]
    assert http.post("/v1/completions", json={"model": BASE_ID, "prompt": "x", "user": user}).json()["medley"] == {
        "task": None,
        "version": None,
        "user": user,
        "customization": None,
        "methods": [],
    }


def test_classification_applies_it(scripted: Scripted, files: dict[str, Files]) -> None:
    engine, http, _ = scripted()
    made = http.post("/v1/tasks/t/versions", files=files["lora"])
    assert made.status_code == 201, made.text
    lay(http, "ann", "t", files["ia3"])
    engine.on_request = lambda request: engine.fail(request.id, "deadline_exceeded")
    http.post("/v1/tasks/t/classify", json={"input": "x", "user": "ann"})
    assert len(engine.requests.get().stack) == 2


def test_it_stays_over_every_version_and_remembers_which_it_was_made_against(
    http: httpx.Client, files: dict[str, Files], user: str
) -> None:
    task = f"line-{user}"
    for method in ("lora", "ia3"):
        http.post(f"/v1/tasks/{task}/versions", files=files[method])
    made = lay(http, user, task, files["prompt"])
    assert made["made_against"] == 2
    assert ask(http, task, user)["medley"]["methods"] == ["ia3", "prompt_tuning"]
    http.patch(f"/v1/tasks/{task}", json={"active_version": 1})
    medley = ask(http, task, user)["medley"]
    assert (medley["methods"], medley["customization"]["made_against"]) == (["lora", "prompt_tuning"], 2)
    http.delete(f"/v1/tasks/{task}")


def test_it_is_made_against_the_version_that_is_active_when_it_comes_into_force(
    scripted: Scripted, files: dict[str, Files]
) -> None:
    """Not the one that was so when its upload began."""
    engine, http, server = scripted()
    assert http.post("/v1/tasks/t/versions", files=files["lora"]).status_code == 201
    new = new_version("b", base=server.facts.fingerprint)
    engine.on_inspect = lambda _: server.wait_for(server.services.index.publish("t", new, activate=True)) and None
    assert lay(http, "ann", "t", files["ia3"])["made_against"] == 2


def test_the_files_of_one_whose_task_was_deleted_meanwhile_are_the_collectors(
    scripted: Scripted, files: dict[str, Files], tmp_path: Path
) -> None:
    engine, http, server = scripted()
    assert http.post("/v1/tasks/t/versions", files=files["lora"]).status_code == 201
    index, blobs = server.services.index, server.services.blobs
    blobs.own(index.index_id)
    engine.on_inspect = lambda _: server.wait_for(index.delete_task("t"))
    assert error_of(http.put("/v1/users/ann/tasks/t", files=files["ia3"])) == (404, "task_not_found")
    assert http.get("/v1/users/ann/tasks").json()["data"] == []
    assert len(list(blobs.list())) == 4, "another upload of the same content may be about to name its two"
    server.wait_for(GarbageCollector(index.garbage, blobs, 0).collect())
    assert list(blobs.list()) == []
    assert [path for path in tmp_path.rglob("staging/*") if path.exists()] == []


def test_a_users_things_are_listed_shown_replaced_and_deleted(
    http: httpx.Client, tasks: dict[str, str], files: dict[str, Files], user: str
) -> None:
    first, second, third = tasks["lora"], tasks["ia3"], tasks["prompt"]
    made = {task: lay(http, user, task, files["lora"]) for task in (first, second, third)}
    listed: list[dict[str, Any]] = []
    has_more = True
    while has_more:
        after = {"after": listed[-1]["task"]} if listed else {}
        page = http.get(f"/v1/users/{user}/tasks", params={"limit": 2, **after}).json()
        listed += page["data"]
        has_more = page["has_more"]
    assert [entry["task"] for entry in listed] == sorted(made)
    for entry in listed:
        assert {**entry, "warnings": []} == {**made[entry["task"]], "warnings": []}
        assert http.get(f"/v1/users/{user}/tasks/{entry['task']}").json() == entry

    replaced = lay(http, user, first, files["prompt"], mode="replace")
    assert (replaced["method"], replaced["mode"]) == ("prompt_tuning", "replace")
    assert ask(http, first, user)["medley"]["methods"] == ["prompt_tuning"]
    assert len(http.get(f"/v1/users/{user}/tasks").json()["data"]) == 3

    path = f"/v1/users/{user}/tasks/{first}"
    assert http.delete(path).status_code == 204
    assert ask(http, first, user)["medley"]["customization"] is None
    assert error_of(http.get(path)) == error_of(http.delete(path)) == (404, "customization_not_found")
    assert http.delete(f"/v1/users/{user}").status_code == 204
    assert http.get(f"/v1/users/{user}/tasks").json() == {"object": "list", "data": [], "has_more": False}
    assert ask(http, second, user)["medley"]["customization"] is None
    assert http.delete(f"/v1/users/{user}").status_code == 204


def test_it_goes_with_its_task_and_does_not_come_back_with_one_of_that_name(
    http: httpx.Client, files: dict[str, Files], user: str
) -> None:
    task = f"gone-{user}"
    http.post(f"/v1/tasks/{task}/versions", files=files["lora"])
    lay(http, user, task, files["ia3"])
    assert ask(http, task, user)["medley"]["methods"] == ["lora", "ia3"]
    http.delete(f"/v1/tasks/{task}")
    http.post(f"/v1/tasks/{task}/versions", files=files["lora"])
    assert ask(http, task, user)["medley"]["methods"] == ["lora"]
    assert http.get(f"/v1/users/{user}/tasks").json()["data"] == []
    http.delete(f"/v1/tasks/{task}")


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_server_that_has_not_read_of_a_tasks_deletion_never_answers_with_the_task_alone(
    scripted: Scripted, files: dict[str, Files], is_made_anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, http, server = scripted()
    engine.on_request = lambda request: engine.finish(request, [70])
    assert http.post("/v1/tasks/t/versions", files=files["lora"]).status_code == 201
    for user in ("known", "cold"):
        lay(http, user, "t", files["ia3"])
    is_deaf = threading.Event()

    async def hear_nothing() -> None:
        is_deaf.set()
        await asyncio.sleep(0.01)

    monkeypatch.setattr(server.services.directory, "_take_news", hear_nothing)
    assert is_deaf.wait(30)
    assert ask(http, "t", "known")["medley"]["customization"] is not None

    async def elsewhere() -> None:
        """What another server does."""
        await server.services.index.delete_task("t")
        if is_made_anew:
            await server.services.index.publish("t", new_version("b", base=server.facts.fingerprint), activate=True)

    server.wait_for(elsewhere())
    assert ask(http, "t", "known")["medley"]["customization"] is not None, "as before the deletion"
    body = {"model": "t", "prompt": "x", "user": "cold"}
    answer = http.post("/v1/completions", json=body)
    if is_made_anew:
        assert (answer.status_code, answer.json()["medley"]["version"]) == (200, 2)
        assert ask(http, "t", "known")["medley"]["customization"] is None, "the later task has none"
    else:
        assert error_of(answer) == (404, "model_not_found")
        assert error_of(http.post("/v1/completions", json={**body, "user": "known"})) == (404, "model_not_found")


def test_a_dry_run_checks_everything_and_keeps_nothing(
    http: httpx.Client, tasks: dict[str, str], files: dict[str, Files], user: str
) -> None:
    path = f"/v1/users/{user}/tasks/{tasks['lora']}"
    tried = http.put(path, files=files["prompt"], params={"dry_run": True})
    assert (tried.status_code, tried.json()["method"], tried.json()["dry_run"]) == (200, "prompt_tuning", True)
    assert error_of(http.get(path)) == (404, "customization_not_found")
    assert lay(http, user, tasks["lora"], files["prompt"])["digest"] == tried.json()["digest"]


@pytest.mark.parametrize("user", ["a b", "-a", "a/b", "", "ü", "a@b", "x" * 129, "a\n"])
def test_what_is_no_user_id_is_refused_by_name(http: httpx.Client, tasks: dict[str, str], user: str) -> None:
    response = http.post("/v1/completions", json={"model": tasks["lora"], "prompt": "x", "user": user})
    assert error_of(response) == (400, "invalid_request")
    assert response.json()["error"]["param"] == "user"
    batch = {"requests": [{"task": tasks["lora"], "input": "x", "user": user}]}
    assert http.post("/v1/generate", json=batch).json()["results"][0]["error"]["param"] == "user"


def test_bad_customizations_are_refused_by_name(
    http: httpx.Client, tasks: dict[str, str], files: dict[str, Files]
) -> None:
    path = f"/v1/users/ann/tasks/{tasks['lora']}"
    bad = http.put("/v1/users/-ann/tasks/any", files=files["lora"])
    assert (error_of(bad), bad.json()["error"]["param"]) == ((400, "invalid_request"), "user")
    assert error_of(http.put(path, files=files["lora"], params={"mode": "beside"})) == (400, "invalid_request")
    assert error_of(http.put("/v1/users/ann/tasks/nobody", files=files["lora"])) == (404, "task_not_found")
    assert error_of(http.put(path, files=files["lora"][:1])) == (400, "missing_file")
    assert error_of(http.put(path, json={})) == (415, "unsupported_media_type")
    assert error_of(http.get(path)) == (404, "customization_not_found")


LIMITS = [
    ({"methods": ["ia3"]}, {}, "methods"),
    ({"max_virtual_tokens": 4}, {"virtual_tokens": 5}, "max_virtual_tokens"),
    ({"max_parameters": 9}, {}, "max_parameters"),
    ({"max_bytes": 100}, {}, "max_bytes"),
]


@pytest.mark.parametrize(("limits", "facts", "named"), LIMITS)
def test_a_task_s_limits_are_held_and_named(
    scripted: Scripted,
    base_facts: BaseFacts,
    files: dict[str, Files],
    limits: dict[str, Any],
    facts: dict[str, Any],
    named: str,
) -> None:
    methods = [MethodEntry(name=name, mechanism="", formats=[], parameters="", cost="") for name in ("lora", "ia3")]
    engine, http, _ = scripted(msgspec.structs.replace(base_facts, methods=methods))
    http.post("/v1/tasks/t/versions", files=files["lora"])
    engine.facts = msgspec.structs.replace(FACTS, **facts)
    shown = http.put("/v1/tasks/t", json={"customization": limits}).json()["customization"]
    assert {name: limit for name, limit in shown.items() if limit is not None} == limits
    for params in ({}, {"dry_run": True}, {"mode": "replace"}):
        refused = http.put("/v1/users/ann/tasks/t", files=files["lora"], params=params)
        assert error_of(refused) == (400, "customization_limit")
        assert refused.json()["error"]["param"] == named
    assert http.get("/v1/users/ann/tasks").json()["data"] == []
    http.put("/v1/tasks/t", json={"customization": None})
    lay(http, "ann", "t", files["lora"])


def test_the_engine_checks_a_composition_under_the_active_version(scripted: Scripted, files: dict[str, Files]) -> None:
    engine, http, _ = scripted()
    http.put("/v1/tasks/t", json={})
    lay(http, "ann", "t", files["ia3"])
    assert engine.inspected.get().under is None  # there is nothing to lay it over yet
    version = http.post("/v1/tasks/t/versions", files=files["lora"]).json()
    assert engine.inspected.get().under is None
    lay(http, "ann", "t", files["ia3"])
    under = engine.inspected.get().under
    assert under is not None
    assert under.digest == version["digest"]
    lay(http, "ann", "t", files["ia3"], mode="replace")
    assert engine.inspected.get().under is None


def test_a_checkpoint_of_several_tasks_is_no_customization(scripted: Scripted, files: dict[str, Files]) -> None:
    engine, http, _ = scripted()
    http.put("/v1/tasks/t", json={})
    engine.facts = AdapterFacts(
        method="multitask", parameters=1, bytes=4, virtual_tokens=1, rank=None, warnings=[], tasks=2
    )
    assert error_of(http.put("/v1/users/ann/tasks/t", files=files["lora"])) == (400, "unsupported_method")


def test_one_made_for_another_base_is_listed_and_named_when_asked_for(
    scripted: Scripted, files: dict[str, Files]
) -> None:
    engine, http, server = scripted()
    engine.on_request = lambda request: engine.finish(request, [70])
    http.put("/v1/tasks/t", json={})
    lay(http, "ann", "t", files["ia3"])
    assert server.services.base is not None
    facts = server.services.base.facts
    server.services.base.facts = msgspec.structs.replace(facts, fingerprint="0" * 64)
    http.post("/v1/tasks/t/versions", files=files["lora"])
    assert not http.get("/v1/users/ann/tasks/t").json()["servable"]
    body = {"model": "t", "prompt": "x"}
    assert http.post("/v1/completions", json=body).status_code == 200
    refused = http.post("/v1/completions", json={**body, "user": "ann"})
    assert error_of(refused) == (409, "base_mismatch")
    assert "the customization of user 'ann' for task 't'" in refused.json()["error"]["message"]


def test_the_length_counts_the_virtual_tokens_of_the_whole_stack(
    scripted: Scripted, base_facts: BaseFacts, files: dict[str, Files]
) -> None:
    engine, http, _ = scripted()
    engine.on_request = lambda request: engine.finish(request, [70])
    engine.facts = msgspec.structs.replace(FACTS, virtual_tokens=100)
    http.post("/v1/tasks/t/versions", files=files["lora"])
    lay(http, "ann", "t", files["ia3"])
    lay(http, "bob", "t", files["ia3"], mode="replace")
    body = {"model": "t", "prompt": PROMPT, "max_tokens": base_facts.max_model_len - 100 - len(PROMPT)}
    for user, status in (("nobody", 200), ("bob", 200), ("ann", 400)):
        response = http.post("/v1/completions", json={**body, "user": user})
        assert response.status_code == status, response.text
    assert "200 virtual tokens" in response.json()["error"]["message"]


@pytest.fixture
def away(base_facts: BaseFacts, tmp_path: Path) -> Iterator[tuple[PrivateRedis, httpx.Client]]:
    """A server whose Redis can be stopped."""
    redis = PrivateRedis(tmp_path / "redis")
    redis.start()
    with (
        FakeEngine(base_facts) as engine,
        ServerThread(redis.url, engine.connection, configuration(tmp_path, tmp_path)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        engine.on_request = lambda request: engine.finish(request, [70])
        yield redis, http
    redis.stop()


def test_with_redis_away_known_customizations_apply_and_unknown_ones_are_503_never_the_task_alone(
    away: tuple[PrivateRedis, httpx.Client], files: dict[str, Files]
) -> None:
    redis, http = away
    http.post("/v1/tasks/t/versions", files=files["lora"])
    for user in ("ann", "bob"):
        lay(http, user, "t", files["ia3"])
    for user in ("ann", "nobody"):
        ask(http, "t", user)
    redis.stop()
    assert ask(http, "t", "ann")["medley"]["methods"] == ["lora", "lora"]  # as the scripted engine calls both
    assert ask(http, "t", "nobody")["medley"]["customization"] is None
    assert ask(http, "t", None)["medley"]["methods"] == ["lora"]
    refused = [
        http.post("/v1/completions", json={"model": "t", "prompt": "x", "user": "bob"}),
        http.put("/v1/users/bob/tasks/t", files=files["lora"]),
        http.delete("/v1/users/ann/tasks/t"),
    ]
    batch = {"requests": [{"task": "t", **TEXT, "user": "bob"}, {"task": "t", **TEXT}]}
    first, second = http.post("/v1/generate", json=batch).json()["results"]
    assert first["error"]["code"] == "store_unavailable"
    assert second["medley"]["methods"] == ["lora"]
    for response in refused:
        assert error_of(response) == (503, "store_unavailable")
        assert response.headers["retry-after"]
    redis.start()
    give_up = time.monotonic() + 30
    while http.post("/v1/completions", json={"model": "t", "prompt": "x", "user": "bob"}).status_code == 503:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert ask(http, "t", "bob")["medley"]["methods"] == ["lora", "lora"]


def test_tenants_have_users_of_their_own_over_public_tasks_too(
    redis_url: str, base_facts: BaseFacts, tmp_path: Path, files: dict[str, Files]
) -> None:
    with keyed(redis_url, base_facts, tmp_path) as server:
        owner, other = server.caller("admin", tenant="a"), server.caller("publish", tenant="b")
        assert owner.post("/v1/tasks/t/versions", files=files["lora"]).status_code == 201
        lay(owner, "ann", "t", files["ia3"])
        assert error_of(other.put("/v1/users/ann/tasks/t", files=files["ia3"])) == (404, "task_not_found")
        assert owner.put("/v1/tasks/t", json={"public": True}).json()["public"]
        medley = other.post("/v1/tasks/t/generate", json={**TEXT, "user": "ann"}).json()["medley"]
        assert medley["customization"] is None
        lay(other, "ann", "t", files["prompt"], mode="replace")
        mine = other.get("/v1/users/ann/tasks").json()["data"]
        assert [(entry["task"], entry["mode"]) for entry in mine] == [("t", "replace")]
        assert [entry["mode"] for entry in owner.get("/v1/users/ann/tasks").json()["data"]] == ["compose"]
        assert other.delete("/v1/users/ann").status_code == 204
        assert owner.get("/v1/users/ann/tasks/t").json()["mode"] == "compose"
        lay(other, "ann", "t", files["prompt"])
        owner.put("/v1/tasks/t", json={"public": False})
        [left] = other.get("/v1/users/ann/tasks").json()["data"]
        assert (left["task"], left["servable"]) == ("t", False), "it still counts, so it is shown"
        assert other.get("/v1/users/ann/tasks/t").json() == left
        assert other.post("/v1/tasks/t/versions", files=files["lora"]).status_code == 201
        lay(other, "ann", "t", files["ia3"])
        assert other.post("/v1/tasks/u/versions", files=files["lora"]).status_code == 201
        lay(other, "ann", "u", files["ia3"])
        shown = other.get("/v1/users/ann/tasks").json()["data"]
        assert [(entry["task"], entry["servable"]) for entry in shown] == [("t", True), ("u", True)], (
            "their own hides it"
        )
        assert other.delete("/v1/users/ann/tasks/t").status_code == 204
        assert other.delete("/v1/tasks/t").status_code == 204
        pages = [other.get("/v1/users/ann/tasks", params={"limit": 1}).json()]
        while pages[-1]["has_more"]:
            assert len(pages) < 3
            after = pages[-1]["data"][-1]["task"]
            pages.append(other.get("/v1/users/ann/tasks", params={"limit": 1, "after": after}).json())
        assert [entry["task"] for page in pages for entry in page["data"]] == ["t", "u"]
        assert other.delete("/v1/users/ann/tasks/t").status_code == 204
        assert error_of(other.delete("/v1/users/ann/tasks/t")) == (404, "customization_not_found")
        assert [entry["task"] for entry in other.get("/v1/users/ann/tasks").json()["data"]] == ["u"]
        assert owner.get("/v1/users/ann/tasks/t").json()["mode"] == "compose", "another tenant's ann"


def test_the_figures_count_customizations_and_name_no_user(scripted: Scripted, files: dict[str, Files]) -> None:
    engine, http, _ = scripted()
    engine.on_request = lambda request: engine.finish(request, [70])
    http.post("/v1/tasks/t/versions", files=files["lora"])
    lay(http, "ann", "t", files["ia3"])
    http.put("/v1/users/ann/tasks/t", files=files["lora"][1:])
    http.put("/v1/users/ann/tasks/t", files=files["lora"], params={"dry_run": True})
    http.post("/v1/completions", json={"model": "t", "prompt": "x", "user": "ann"})
    http.post("/v1/completions", json={"model": "t", "prompt": "x", "user": "bob"})
    figures = http.get("/metrics").text
    for outcome in ("created", "missing_file", "checked"):
        assert f'medley_customizations_total{{outcome="{outcome}"}} 1.0' in figures
    assert 'medley_customized_requests_total{mode="compose"} 1.0' in figures
    assert "ann" not in figures
