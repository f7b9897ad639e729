"""A server whose adapters are in a bucket: uploads, restarts without a copy, and the bucket's faults."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.bucket_server import BUCKET, BucketServer, bucket_server
from tests.server_process import PATIENCE_SECONDS, ServerProcess, generate, one_line, run_medley, upload


@pytest.fixture
def bucket() -> Iterator[BucketServer]:
    with bucket_server() as server:
        yield server


def serve(base: Path, data: Path, bucket: BucketServer, url: str) -> ServerProcess:
    return ServerProcess(base, data, "--store", url, **bucket.environment)


def answer(server: ServerProcess, task: str) -> str:
    response = generate(server.url, task)
    assert response.status_code == 200, response.text
    text: str = response.json()["output"]
    return text


def test_an_upload_to_a_bucket_is_served_after_a_restart_without_a_copy_and_read_through_its_faults(
    base: Path, adapter: Path, tmp_path: Path, bucket: BucketServer
) -> None:
    url = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    data = tmp_path / "data"
    files = ("adapter_config.json", "adapter_model.safetensors")
    with serve(base, data, bucket, url) as server:
        assert upload(server.url, "t", adapter).status_code == 201
        said = answer(server, "t")
        assert server.stop() == 0
    shutil.rmtree(data / "blob-cache")
    with serve(base, data, bucket, url) as server:
        assert answer(server, "t") == said
        for name in files:
            path = f"{server.url}/v1/tasks/t/versions/1/files/{name}"
            assert httpx.get(path).content == (adapter / name).read_bytes()
        assert upload(server.url, "other", adapter).status_code == 201

        bucket.stop()
        assert answer(server, "t") == said  # what this machine has
        assert httpx.get(f"{server.url}/v1/tasks/t/versions/1/files/{files[1]}").status_code == 200
        refused = upload(server.url, "u", adapter)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert "bucket" in refused.json()["error"]["message"]
        assert "Retry-After" in refused.headers
        assert httpx.get(f"{server.url}/v1/tasks/u").status_code == 404
        assert list((data / "blob-cache" / "staging").iterdir()) == []
        assert server.stop() == 0

    # A start without the bucket, and without a copy: the task is known, its files are not to be had for the moment.
    shutil.rmtree(data / "blob-cache")
    with serve(base, data, bucket, url) as server:
        away = generate(server.url, "t")
        assert (away.status_code, away.json()["error"]["code"]) == (503, "store_unavailable")
        assert "Retry-After" in away.headers
        bucket.start()
        give_up = time.monotonic() + PATIENCE_SECONDS
        while generate(server.url, "t").status_code == 503 and time.monotonic() < give_up:
            time.sleep(0.2)  # what failed to load rests for a few seconds
        assert answer(server, "t") == said
        assert server.stop() == 0


def test_a_bucket_that_does_not_exist_stops_the_start_with_a_line(
    base: Path, tmp_path: Path, bucket: BucketServer
) -> None:
    options = ("serve", "--model", str(base), "--data-dir", str(tmp_path / "data"), "--port", "0")
    failed = run_medley(*options, "--store", "s3://no-such-bucket", **bucket.environment)
    assert failed.returncode == 1
    assert "there is no bucket at s3://no-such-bucket" in one_line(failed.stderr.splitlines(keepends=True)[-1])
