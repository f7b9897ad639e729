"""The engine's client by itself: every open request has exactly one end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from server.engine.client import EngineClient
from server.engine.protocol import BaseFacts, Configure, Generate, Sampling, StepStats, Tokens
from server.errors import RequestError, StartupError
from tests.api.conftest import configuration
from tests.api.fake_engine import STATS, FakeEngine


@pytest.fixture
def configure(tmp_path: Any) -> Configure:
    return configuration(tmp_path, tmp_path)


def request(name: str) -> Generate:
    return Generate(id=name, prompt=[5], sampling=Sampling(max_tokens=9), deadline=time.time() + 60)


def run(engine: FakeEngine, configure: Configure, scenario: Any, steps: list[StepStats] | None = None) -> None:
    """Run `scenario(client)` on a started client."""

    async def main() -> None:
        client = await EngineClient.connect(engine.connection, on_step=None if steps is None else steps.append)
        try:
            await client.start(configure)
            work: Coroutine[Any, Any, None] = scenario(client)
            await work
        finally:
            await client.close()

    asyncio.run(main())


def test_an_engine_that_cannot_start_says_why(configure: Configure) -> None:
    with FakeEngine(None) as engine, pytest.raises(StartupError, match="no base to run"):
        run(engine, configure, None)


def test_sequences_of_a_request_come_interleaved_and_end_together(base_facts: BaseFacts, configure: Configure) -> None:
    steps: list[StepStats] = []

    async def scenario(client: EngineClient) -> None:
        with client.open([request("a"), request("b")]) as stream:
            assert client.open_sequences == 2
            engine.say(Tokens(id="a", token_ids=[1]), Tokens(id="b", token_ids=[2]))
            engine.say(Tokens(id="b", token_ids=[3], finish_reason="length"))
            engine.say(Tokens(id="a", token_ids=[], finish_reason="stop", stop_token=7))
            seen = [(tokens.id, tokens.token_ids) async for tokens in stream]
        assert seen == [("a", [1]), ("b", [2]), ("b", [3]), ("a", [])]
        assert client.open_sequences == 0

    with FakeEngine(base_facts) as engine:
        run(engine, configure, scenario, steps)
        assert steps == [STATS] * 3
        assert engine.aborted.empty(), "what has finished is not aborted"


def test_leaving_early_aborts_what_is_open_and_nothing_else(base_facts: BaseFacts, configure: Configure) -> None:
    async def scenario(client: EngineClient) -> None:
        with client.open([request("a"), request("b"), request("c")]) as stream:
            engine.say(Tokens(id="a", token_ids=[1], finish_reason="length"))
            assert (await anext(stream)).id == "a"
            stream.stop("b")
            engine.say(Tokens(id="b", token_ids=[1]), Tokens(id="c", token_ids=[2]))  # the step was under way
            assert (await anext(stream)).id == "c"
        assert client.open_sequences == 0

    with FakeEngine(base_facts) as engine:
        run(engine, configure, scenario)
        assert [engine.aborted.get(), engine.aborted.get()] == ["b", "c"]


def test_the_engines_end_reaches_everyone_who_waits(base_facts: BaseFacts, configure: Configure) -> None:
    async def tokens_of(client: EngineClient, name: str) -> None:
        with client.open([request(name)]) as stream:
            async for _ in stream:
                pass

    async def scenario(client: EngineClient) -> None:
        waiting = [asyncio.create_task(tokens_of(client, name)) for name in "abc"]
        await asyncio.sleep(0)  # each has sent its request
        assert client.open_sequences == 3
        engine.die("the device is lost")
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, RequestError)
            assert error.code == "engine_dead"
            assert "the device is lost" in error.message
        assert await client.closed() == "the device is lost"
        assert not client.alive
        with pytest.raises(RequestError, match="engine process is gone"):
            await tokens_of(client, "d")
        with pytest.raises(RequestError, match="engine process is gone"):
            await client.inspect("e", "folder")

    with FakeEngine(base_facts) as engine:
        run(engine, configure, scenario)
