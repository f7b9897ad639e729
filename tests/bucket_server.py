"""An S3 server for tests: moto's, the real protocol over HTTP, with its objects in this process's memory."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

if TYPE_CHECKING:  # the library has this name for type checkers only
    from obstore.store import ClientConfig

BUCKET = "medley"


class BucketServer:
    """One server with the bucket `BUCKET`. What is in it outlives `stop`, as it would a real server's restart."""

    def __init__(self) -> None:
        self._port = 0
        self.start()
        httpx.put(f"{self.endpoint}/{BUCKET}").raise_for_status()

    @property
    def endpoint(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in order to reach it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Return when it answers, on the port that it had before."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.stop()

    def objects(self) -> S3Store:
        """The bucket itself: to look at and change objects behind everybody's back."""
        options: ClientConfig = {"allow_http": True}
        return S3Store(
            BUCKET,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id="key",
            secret_access_key="secret",
            client_options=options,
        )


@contextmanager
def bucket_server() -> Iterator[BucketServer]:
    """A server that is stopped at the end."""
    server = BucketServer()
    yield server
    server.stop()


def use(server: BucketServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have this process reach it; the URL of a place of the test's own in its bucket."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{secrets.token_hex(8)}"
