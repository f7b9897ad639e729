"""Several servers on one Redis and one store: what one is told, all do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.adapters import Adapters
from tests.faults.client import Client, error_of
from tests.faults.cluster import Cluster, everywhere, until
from tests.faults.conftest import Record, Scale


class Soon:
    """What has to hold at each of the servers within a second, and the longest that it took."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._slowest: dict[str, float] = {}

    def everywhere(self, change: str, clients: Sequence[Client], holds: Callable[[Client], bool]) -> None:
        """Return once the change that was just acknowledged shows at each of the servers."""
        seconds = everywhere(clients, holds, self._scale.soon_seconds)
        self._slowest[change] = max(seconds, self._slowest.get(change, 0.0))

    def record(self, record_property: Record) -> None:
        """The figures."""
        for change, seconds in self._slowest.items():
            record_property(f"{change}: seconds until every server's, worst of {self._scale.rounds}", round(seconds, 3))


def test_an_upload_an_activation_and_a_deletion_at_one_server_are_every_servers(
    cluster: Cluster, prompts: Adapters, scale: Scale, record_property: Record
) -> None:
    soon, clients = Soon(scale), cluster.clients()
    for number in range(scale.rounds):
        upload_activate_and_delete(f"shared-{number}", clients, prompts, soon)
    soon.record(record_property)


def upload_activate_and_delete(task: str, clients: list[Client], prompts: Adapters, soon: Soon) -> None:
    """Each at another server."""
    first, second, third = clients
    first.published(task, prompts[1])
    said = first.said(task)
    soon.everywhere("an upload of a new task", clients, lambda client: client.generate(task).status_code == 200)
    assert second.said(task) == third.said(task) == said

    second.published(task, prompts[2])
    soon.everywhere("an upload of a version", clients, lambda client: client.said(task).version == 2)
    for other in (first, third):
        assert other.said(task).output == second.said(task).output != said.output
    assert third.http.patch(f"/v1/tasks/{task}", json={"active_version": 1}).status_code == 200
    soon.everywhere("an activation", clients, lambda client: client.said(task) == said)

    assert first.http.delete(f"/v1/tasks/{task}").status_code == 204
    assert error_of(first.generate(task)) == (404, "task_not_found")
    soon.everywhere("a deletion", clients, lambda client: client.generate(task).status_code == 404)


def test_a_users_layer_is_applied_replaced_and_removed_at_every_server(
    cluster: Cluster, prompts: Adapters, loras: Adapters, scale: Scale, record_property: Record
) -> None:
    soon, clients = Soon(scale), cluster.clients()
    clients[0].published("layered", prompts[1])
    everywhere(clients, lambda client: client.generate("layered", user="ann").status_code == 200)
    for _ in range(scale.rounds):
        apply_replace_and_remove("layered", clients, loras[2], prompts[3], soon)
    soon.record(record_property)


def apply_replace_and_remove(task: str, clients: list[Client], lora: Path, prompt: Path, soon: Soon) -> None:
    """The layer of the user ann over a task that is a soft prompt."""
    one, other, _ = clients
    alone = one.said(task)
    assert {client.said(task, user="ann") for client in clients} == {alone}, "all know that she has none"

    assert one.customize("ann", task, lora).status_code == 201
    both = one.said(task, user="ann")
    assert both.methods == ("prompt_tuning", "lora")
    soon.everywhere("a user's layer", clients, lambda client: client.said(task, user="ann") == both)
    assert other.customize("ann", task, prompt, mode="replace").status_code == 201
    hers = other.said(task, user="ann")
    assert hers not in (alone, both)
    soon.everywhere("a layer in its place", clients, lambda client: client.said(task, user="ann") == hers)
    assert {client.said(task, user="ben") for client in clients} == {alone}

    assert one.http.delete("/v1/users/ann").status_code == 204
    soon.everywhere("its removal", clients, lambda client: client.said(task, user="ann") == alone)


def test_a_revoked_key_is_refused_by_every_server(
    cluster: Cluster, prompts: Adapters, scale: Scale, record_property: Record
) -> None:
    soon = Soon(scale)
    operator, *_ = cluster.clients()
    operator.published("guarded", prompts[1])
    for _ in range(scale.rounds):
        make_and_revoke(cluster, soon)
    soon.record(record_property)


def make_and_revoke(cluster: Cluster, soon: Soon) -> None:
    """A key that all servers know."""
    key, text = cluster.key("invoke")
    callers = [cluster.client(server, text) for server in range(3)]
    everywhere(callers, lambda caller: caller.generate("guarded").status_code == 200)
    cluster.index(lambda index: index.api_keys.revoke(key.id))
    soon.everywhere("a key's revocation", callers, lambda caller: caller.generate("guarded").status_code == 401)


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


def test_the_same_upload_at_every_server_at_once_is_one_version(cluster: Cluster, prompts: Adapters) -> None:
    clients = cluster.clients()
    folder = prompts[1]  # written when it is asked for, by one thread
    with ThreadPoolExecutor(len(clients)) as pool:
        answers = list(pool.map(lambda client: client.publish("repeated", folder), clients))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 201]
    assert [answer.json()["version"] for answer in answers] == [1, 1, 1]
    assert len(clients[0].http.get("/v1/tasks/repeated").json()["versions"]) == 1


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
