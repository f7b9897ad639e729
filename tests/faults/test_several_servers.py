"""Several servers on one Redis and one store: what one is told, all do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.faults.adapters import Adapters
from tests.faults.client import error_of
from tests.faults.cluster import Cluster, everywhere, until
from tests.faults.conftest import Scale


def test_an_upload_an_activation_and_a_deletion_at_one_server_are_every_servers(
    cluster: Cluster, prompts: Adapters, scale: Scale
) -> None:
    first, *others = cluster.clients()
    first.published("shared", prompts[1])
    said = first.said("shared")
    everywhere(others, lambda other: other.generate("shared").status_code == 200, scale.soon_seconds)
    for other in others:
        assert other.said("shared") == said

    others[0].published("shared", prompts[2])
    everywhere((first, others[1]), lambda other: other.said("shared").version == 2, scale.soon_seconds)
    for other in (first, others[1]):
        assert other.said("shared").output == others[0].said("shared").output != said.output
    assert others[1].http.patch("/v1/tasks/shared", json={"active_version": 1}).status_code == 200
    everywhere((first, others[0]), lambda other: other.said("shared") == said, scale.soon_seconds)

    assert first.http.delete("/v1/tasks/shared").status_code == 204
    assert error_of(first.generate("shared")) == (404, "task_not_found")
    everywhere(others, lambda other: other.generate("shared").status_code == 404, scale.soon_seconds)


def test_a_users_layer_is_applied_replaced_and_removed_at_every_server(
    cluster: Cluster, prompts: Adapters, loras: Adapters, scale: Scale
) -> None:
    clients = one, other, _ = cluster.clients()
    one.published("layered", prompts[1])
    everywhere(clients, lambda client: client.generate("layered", user="ann").status_code == 200)
    alone = one.said("layered")
    assert {client.said("layered", user="ann") for client in clients} == {alone}, "all know that she has none"

    assert one.customize("ann", "layered", loras[2]).status_code == 201
    both = one.said("layered", user="ann")
    assert both.methods == ("prompt_tuning", "lora")
    everywhere(clients, lambda client: client.said("layered", user="ann") == both, scale.soon_seconds)
    assert other.customize("ann", "layered", prompts[3], mode="replace").status_code == 201
    hers = other.said("layered", user="ann")
    assert hers not in (alone, both)
    everywhere(clients, lambda client: client.said("layered", user="ann") == hers, scale.soon_seconds)
    assert {client.said("layered", user="ben") for client in clients} == {alone}

    assert one.http.delete("/v1/users/ann").status_code == 204
    everywhere(clients, lambda client: client.said("layered", user="ann") == alone, scale.soon_seconds)


def test_a_revoked_key_is_refused_by_every_server(cluster: Cluster, prompts: Adapters, scale: Scale) -> None:
    operator, *_ = cluster.clients()
    operator.published("guarded", prompts[1])
    key, text = cluster.key("invoke")
    callers = [cluster.client(server, text) for server in range(3)]
    everywhere(callers, lambda caller: caller.generate("guarded").status_code == 200)
    cluster.index(lambda index: index.api_keys.revoke(key.id))
    everywhere(callers, lambda caller: caller.generate("guarded").status_code == 401, scale.soon_seconds)


def test_publishes_of_one_task_at_once_at_different_servers_are_all_kept_numbered_and_one_is_active(
    cluster: Cluster, prompts: Adapters
) -> None:
    clients = cluster.clients()
    numbers = range(1, 10)
    with ThreadPoolExecutor(len(numbers)) as pool:
        answers = list(pool.map(lambda number: clients[number % 3].publish("crowded", prompts[number]), numbers))
    assert [answer.status_code for answer in answers] == [201] * len(numbers)
    assert sorted(answer.json()["version"] for answer in answers) == list(numbers)
    task = clients[0].http.get("/v1/tasks/crowded").json()
    assert [version["version"] for version in task["versions"]] == list(numbers)
    assert sum(version["active"] for version in task["versions"]) == 1
    everywhere(clients, lambda client: client.said("crowded").version == task["active"])


def test_a_server_that_was_cut_off_from_redis_catches_up_with_what_another_did(
    cluster: Cluster, prompts: Adapters, scale: Scale
) -> None:
    one, _, cut_off = cluster.clients()
    one.published("changing", prompts[1])
    one.published("leaving", prompts[1])
    until(lambda: cut_off.generate("changing").status_code == cut_off.generate("leaving").status_code == 200)
    cluster.proxy.shut()
    until(lambda: cut_off.ready()["redis"] == "away")
    one.published("changing", prompts[2])
    one.published("coming", prompts[3])
    assert one.http.delete("/v1/tasks/leaving").status_code == 204
    assert cut_off.said("changing").version == cut_off.said("leaving").version == 1, "as far as it knows"
    assert error_of(cut_off.generate("coming")) == (503, "store_unavailable")
    cluster.proxy.open()
    until(lambda: cut_off.ready()["redis"] == "ok")
    until(lambda: cut_off.generate("coming").status_code == 200, scale.soon_seconds)
    assert cut_off.said("changing").version == 2
    assert error_of(cut_off.generate("leaving")) == (404, "task_not_found")
