"""Servers that ask for keys, and clients that have one: for the tests of keys, tenants and quotas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from adapters_store import ApiKey, KeyScope, Quotas
from server.engine.protocol import BaseFacts, Generate
from tests.api.conftest import configuration
from tests.api.fake_engine import FakeEngine
from tests.api.server_thread import ServerThread

NO_QUOTAS = Quotas()


class Keyed:
    """A server with `--auth` over a scripted engine that answers every request with `engine.answer` tokens."""

    def __init__(self, engine: FakeEngine, server: ServerThread, stack: ExitStack) -> None:
        self.engine = engine
        self.server = server
        self.answer = [70]
        self._stack = stack
        engine.on_request = self.answer_request

    def key(self, *scopes: KeyScope, tenant: str = "", quotas: Quotas = NO_QUOTAS) -> tuple[ApiKey, str]:
        """A new key and its text."""
        keys = self.server.services.index.api_keys
        return self.server.wait_for(keys.create("test", scopes, tenant=tenant, quotas=quotas))

    def revoke(self, key: ApiKey) -> None:
        self.server.wait_for(self.server.services.index.api_keys.revoke(key.id))

    def client(self, text: str | None) -> httpx.Client:
        """A client with this key's text."""
        headers = {} if text is None else {"Authorization": f"Bearer {text}"}
        # No certificates are needed here, and reading the system's takes longer than a request.
        client = httpx.Client(base_url=self.server.url, headers=headers, timeout=30, verify=False)
        return self._stack.enter_context(client)

    def caller(self, *scopes: KeyScope, tenant: str = "", quotas: Quotas = NO_QUOTAS) -> httpx.Client:
        """A client with a new key."""
        return self.client(self.key(*scopes, tenant=tenant, quotas=quotas)[1])

    def answer_request(self, request: Generate) -> None:
        if request.classify or request.sampling.prompt_logprobs_from is not None:
            self.engine.fail(request.id, "deadline_exceeded")  # what these calls answer is tested elsewhere
        else:
            self.engine.finish(request, self.answer)


@contextmanager
def keyed(
    redis_url: str, facts: BaseFacts, folder: Path, *, namespace: str | None = None, **settings: Any
) -> Iterator[Keyed]:
    """A server that asks for keys."""
    with ExitStack() as stack:
        engine = stack.enter_context(FakeEngine(facts))
        thread = ServerThread(
            redis_url,
            engine.connection,
            configuration(folder, folder),
            namespace=namespace,
            **{"auth": True, **settings},
        )
        yield Keyed(engine, stack.enter_context(thread), stack)


def error_of(response: httpx.Response) -> tuple[int, str]:
    """Status and code."""
    return response.status_code, response.json()["error"]["code"]


def ids_of(response: httpx.Response, field: str) -> Sequence[str]:
    """The ids of a list."""
    assert response.status_code == 200, response.text
    return [entry[field] for entry in response.json()["data"]]
