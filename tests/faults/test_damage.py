"""Damaged blobs, and a disk that is full."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.faults.adapters import CONFIG, WEIGHTS, Adapters
from tests.faults.client import Client, Said, error_of
from tests.faults.cluster import Cluster, until
from tests.server_process import ServerProcess

DISK = "24m"
LARGEST_FILE = 65536  # bytes; more than the log will have, less than `LONG_PROMPT` needs
LONG_PROMPT = 1000  # virtual tokens, 128 bytes each
LEFT_BYTES = 8192  # room for the index, not for a LoRA of the tests with its config
OWN_MOUNTS = (("unshare", "--user", "--map-root-user", "--mount"), ("unshare", "--mount"))
"""Commands that run another where it may mount: for anybody; for root, where the system has that off for others."""


@pytest.mark.parametrize(("damage", "number"), [("flipped", 101), ("cut", 102), ("removed", 103)])
def test_a_damaged_blob_costs_its_version_alone_and_uploading_it_again_heals_it(
    cluster: Cluster, prompts: Adapters, damage: str, number: int
) -> None:
    """`number`: of an adapter that no other test uses, so that it is not resident."""
    one, *_ = cluster.clients()
    task = f"damaged-{damage}"
    one.published(task, prompts[number + 50])
    sound = one.said(task)
    one.published(task, prompts[number])
    sha256 = spoil(cluster, prompts[number], damage)

    for refused in (one.generate(task), one.generate(f"{task}@2"), one.generate(task)):
        assert error_of(refused) == (503, "version_corrupt")
        message = refused.json()["error"]["message"]
        assert sha256 in message
        assert "uploading the same content again heals it" in message
    file = one.http.get(f"/v1/tasks/{task}/versions/2/files/{WEIGHTS}")
    assert error_of(file) == (503, "version_corrupt"), "nor is its file given out"
    assert one.said(f"{task}@1") == sound

    again = one.publish(task, prompts[number])
    assert (again.status_code, again.json()["version"]) == (200, 2)
    healed = one.said(task)
    assert healed.version == 2
    assert healed.output != sound.output
    file = one.http.get(f"/v1/tasks/{task}/versions/2/files/{WEIGHTS}")
    assert hashlib.sha256(file.content).hexdigest() == sha256


def test_a_damaged_layer_of_a_user_costs_that_user_alone_and_uploading_it_again_heals_it(
    cluster: Cluster, prompts: Adapters, loras: Adapters
) -> None:
    one, *_ = cluster.clients()
    one.published("layered-damage", prompts[104])
    said = one.said("layered-damage")
    assert one.customize("ann", "layered-damage", loras[105]).status_code == 201
    sha256 = spoil(cluster, loras[105], "flipped")
    refused = one.generate("layered-damage", user="ann")
    assert error_of(refused) == (503, "version_corrupt"), "never the task alone in its place"
    assert sha256 in refused.json()["error"]["message"]
    assert one.said("layered-damage") == one.said("layered-damage", user="ben") == said

    assert one.customize("ann", "layered-damage", loras[105]).status_code in (200, 201)
    assert one.said("layered-damage", user="ann").methods == ("prompt_tuning", "lora")


def spoil(cluster: Cluster, folder: Path, damage: str) -> str:
    """Damage the stored weights of an adapter; their name."""
    sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    blob = cluster.blobs / sha256[:2] / sha256
    content = bytearray(blob.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        blob.write_bytes(content)
    elif damage == "cut":
        blob.write_bytes(content[:-1])
    else:
        blob.unlink()
    return sha256


@pytest.fixture
def small_disk(base: Path, tmp_path: Path) -> Iterator[tuple[ServerProcess, Path]]:
    """A server whose data folder is a file system of `DISK` bytes, and that folder as this process reaches it."""
    data = tmp_path / "data"
    data.mkdir()
    mount = f'mount -t tmpfs -o size={DISK} tmpfs "{data}" && exec "$0" "$@"'
    for own_mounts in OWN_MOUNTS:
        in_it = (*own_mounts, "sh", "-c", mount)
        if not shutil.which(own_mounts[0]):
            continue
        if subprocess.run([*in_it, "true"], check=False, capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("nobody may mount a small file system here; the test with a limit on files needs none")
    with ServerProcess(base, data, wrapper=in_it) as server:
        yield server, Path(f"/proc/{server.process.pid}/root{data}")


def test_a_full_disk_refuses_publishes_with_507_keeps_nothing_of_them_and_serves_on(
    small_disk: tuple[ServerProcess, Path], prompts: Adapters, loras: Adapters
) -> None:
    server, disk = small_disk
    with Client(server.url) as client:
        client.published("kept", prompts[1])
        kept = client.said("kept")
        fill(disk, LEFT_BYTES)
        check_no_room(client, disk / "blobs", kept, loras)

        fill(disk, 0)  # now the private Redis has no room either
        change = client.http.put("/v1/tasks/kept", json={"description": "d" * 1000})
        assert error_of(change) == (503, "store_unavailable")
        assert error_of(client.publish("refused", loras[1])) in ((507, "store_full"), (503, "store_unavailable"))
        assert client.said("kept") == kept

        (disk / "ballast").unlink()
        until(lambda: client.publish("refused", loras[1]).status_code == 201)
        assert client.said("refused").version == 1
        assert client.said("kept") == kept


@pytest.fixture
def long_prompts(prompts: Adapters, tmp_path: Path) -> Adapters:
    """Soft prompts of `LONG_PROMPT` tokens."""
    pattern = tmp_path / "pattern"
    shutil.copytree(prompts[1], pattern)
    config = json.loads((pattern / CONFIG).read_text())
    (pattern / CONFIG).write_text(json.dumps({**config, "num_virtual_tokens": LONG_PROMPT}))
    [(name, tensor)] = load_file(pattern / WEIGHTS).items()
    save_file({name: np.zeros((LONG_PROMPT, tensor.shape[1]), np.float32)}, pattern / WEIGHTS)
    return Adapters(pattern, tmp_path)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system cannot limit a process that runs")
def test_where_files_may_not_grow_publishes_get_507_and_leave_nothing(
    cluster: Cluster, prompts: Adapters, long_prompts: Adapters
) -> None:
    """A limit of the process, which anybody may set, in place of a full file system."""
    one, *_ = cluster.clients()
    store = cluster.blobs.parent
    one.published("kept", prompts[1])
    kept = one.said("kept")
    pid = cluster.servers[0].process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (LARGEST_FILE, limits[1]))
    try:
        check_no_room(one, store, kept, long_prompts)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert one.published("refused", long_prompts[1]) == 1


def check_no_room(client: Client, store: Path, kept: Said, adapters: Adapters) -> None:
    """Adapters are refused with 507 and leave nothing, and the task `kept` answers on."""
    files = files_of(store)
    for refused in (
        client.publish("refused", adapters[1]),
        client.publish("kept", adapters[2]),
        client.customize("ann", "kept", adapters[3]),
    ):
        assert error_of(refused) == (507, "store_full")
    assert files_of(store) == files, "nothing of them is left"
    assert client.said("kept") == kept
    assert client.said("kept", user="ann") == kept
    assert error_of(client.generate("refused")) == (404, "task_not_found")
    assert len(client.http.get("/v1/tasks/kept").json()["versions"]) == 1


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes."""
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        ballast.write(bytes(shutil.disk_usage(disk).free - left))
    assert shutil.disk_usage(disk).free == left


def files_of(store: Path) -> set[str]:
    """All files of a blob store, those of uploads that are under way included."""
    return {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
