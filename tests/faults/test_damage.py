"""Damaged blobs, and a disk that is full."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.adapters import WEIGHTS, Adapters
from tests.faults.client import Client, error_of
from tests.faults.cluster import Cluster, until
from tests.server_process import ServerProcess

DISK = "24m"
LEFT_BYTES = 8192  # room for the index, not for a LoRA of the tests with its config
IN_OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount")


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
    sha256 = hashlib.sha256((prompts[number] / WEIGHTS).read_bytes()).hexdigest()
    blob = cluster.blobs / sha256[:2] / sha256
    content = bytearray(blob.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        blob.write_bytes(content)
    elif damage == "cut":
        blob.write_bytes(content[:-1])
    else:
        blob.unlink()

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


@pytest.fixture
def small_disk(base: Path, tmp_path: Path) -> Iterator[tuple[ServerProcess, Path]]:
    """A server whose data folder is a file system of `DISK` bytes, and that folder as this process reaches it."""
    unshare = shutil.which(IN_OWN_MOUNTS[0])
    if unshare is None or subprocess.run([*IN_OWN_MOUNTS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system; tests/store has what needs none")
    data = tmp_path / "data"
    data.mkdir()
    mount = f'mount -t tmpfs -o size={DISK} tmpfs "{data}" && exec "$0" "$@"'
    with ServerProcess(base, data, wrapper=(*IN_OWN_MOUNTS, "sh", "-c", mount)) as server:
        yield server, Path(f"/proc/{server.process.pid}/root{data}")


def test_a_full_disk_refuses_publishes_with_507_keeps_nothing_of_them_and_serves_on(
    small_disk: tuple[ServerProcess, Path], prompts: Adapters, loras: Adapters
) -> None:
    server, disk = small_disk
    with Client(server.url) as client:
        client.published("kept", prompts[1])
        kept = client.said("kept")
        files = files_of(disk)
        fill(disk, LEFT_BYTES)
        for refused in (
            client.publish("new", loras[1]),
            client.publish("kept", loras[2]),
            client.customize("ann", "kept", loras[3]),
        ):
            assert error_of(refused) == (507, "store_full")
        assert files_of(disk) == files, "nothing of them is left"
        assert client.said("kept") == kept
        assert error_of(client.generate("new")) == (404, "task_not_found")
        assert len(client.http.get("/v1/tasks/kept").json()["versions"]) == 1

        fill(disk, 0)  # now the private Redis has no room either
        change = client.http.put("/v1/tasks/kept", json={"description": "d" * 1000})
        assert error_of(change) == (503, "store_unavailable")
        assert error_of(client.publish("new", loras[1])) in ((507, "store_full"), (503, "store_unavailable"))
        assert client.said("kept") == kept

        (disk / "ballast").unlink()
        until(lambda: client.publish("new", loras[1]).status_code == 201)
        assert client.said("new").version == 1
        assert client.said("kept") == kept


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes."""
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        ballast.write(bytes(shutil.disk_usage(disk).free - left))
    assert shutil.disk_usage(disk).free == left


def files_of(disk: Path) -> set[str]:
    """All files of the blob store."""
    return {str(path.relative_to(disk)) for path in (disk / "blobs").rglob("*") if path.is_file()}
