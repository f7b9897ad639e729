"""One generating request on its way through the engine: sequences in, choices out.

`n` choices of each prompt are `n` sequences; choice `c` of prompt `p` is choice `p * n + c` of the answer. Whatever
ends the iteration of `deltas` (the last token, an error, a client that went away) also ends the sequences.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from adapters_store import StoreUnavailable
from server.api.caller import Caller
from server.api.choice import Choice, Delta
from server.api.metrics import Metrics
from server.api.prompts import Prompt, room_for
from server.api.resolve import Target, naming
from server.api.sampling import SamplingPlan
from server.api.services import ServedBase, Services
from server.engine.protocol import Generate, Tokens
from server.errors import RequestError

_UNKNOWN = "unknown"  # the metrics' label of requests for what does not exist


class Arrival:
    """A request that has not reached the engine yet: when it came, and what the metrics call its task."""

    def __init__(self) -> None:
        self.at = time.perf_counter()
        self.label = _UNKNOWN


@contextmanager
def arrival(metrics: Metrics) -> Iterator[Arrival]:
    """Count a request that is refused inside the block; whoever resolves its task says so in `label`."""
    arrived = Arrival()
    try:
        yield arrived
    except RequestError as error:
        metrics.request(arrived.label, error.code)
        raise
    except StoreUnavailable:
        metrics.request(arrived.label, "store_unavailable")
        raise


@dataclass(slots=True)
class _Clock:
    """When a sequence's tokens came, in seconds."""

    first: float = 0.0
    last: float = 0.0


class Generation:
    """See the module."""

    def __init__(
        self,
        services: Services,
        base: ServedBase,
        caller: Caller,
        target: Target,
        prompts: Sequence[Prompt],
        plan: SamplingPlan,
        *,
        n: int,
        param: str,
        user: str | None,
        priority: int | None,
        arrived: Arrival,
        classify: bool = False,
        shared_tokens: int = 0,
    ) -> None:
        """`param`: the field that held the prompts, `shared_tokens`: with how many of the same tokens all of them
        begin, which are counted once. Who is served in turn is the API key, else the `user`; all who have neither are
        one client. Raises `RequestError` when a prompt is too long."""
        self.id = uuid.uuid4().hex
        self.created = int(time.time())
        self.target = target
        self.prompts = prompts
        self.n = n
        self.tokenizer = base.tokenizer
        self._engine = base.engine
        self._metrics = services.metrics
        self._bill = caller.bill
        self._shared_tokens = shared_tokens
        self._arrived = arrived
        self._deadline = time.time() + services.settings.request_timeout
        self._requests: list[Generate] = []
        self.choices: list[Choice] = []
        for prompt in prompts:
            sampling = plan.sampling(room_for(prompt, target, base.facts, plan.max_tokens, param=param))
            for choice in range(n):
                request_id = f"{self.id}-{len(self._requests)}"
                self._requests.append(
                    Generate(
                        id=request_id,
                        prompt=prompt.token_ids,
                        stack=target.stack,
                        sampling=sampling,
                        classify=classify,
                        choice=choice,
                        client=caller.key_id or user or "",
                        tenant=caller.tenant,
                        priority=priority or 0,
                        deadline=self._deadline,
                    )
                )
                self.choices.append(
                    Choice(base.tokenizer, prompt.token_ids, stop=plan.stop, min_tokens=sampling.min_tokens)
                )
        self._index = {request.id: index for index, request in enumerate(self._requests)}
        self._clocks = [_Clock() for _ in self._requests]
        self._has_begun = False
        self._unfinished = len(self._requests)

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return self._unfinished == 0

    @property
    def seconds_left(self) -> float:
        """Until the request's deadline."""
        return self._deadline - time.time()

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of a choice."""
        return self.prompts[index // self.n]

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """What each step adds, as (index of the choice, delta). Raises the `RequestError` that ends the request."""
        outcome = "cancelled"
        try:
            with self._engine.open(self._requests) as stream:
                async for tokens in stream:
                    index = self._index[tokens.id]
                    delta = self.choices[index].feed(tokens)
                    self._time(index, tokens)
                    if delta.finish_reason is not None:
                        stream.stop(tokens.id)  # a stop string: the engine does not know
                        self._finish(index)
                        outcome = "ok" if self.finished else outcome
                    yield index, delta
        except RequestError as error:
            outcome = error.code
            raise naming(error, self.target.layers) from None
        finally:
            self._metrics.request(self.target.label, outcome)
            # The engine may have computed the prompt for a caller who left before the first token.
            if self._has_begun or outcome == "cancelled":
                self._bill.tokens += self.usage()["total_tokens"]

    async def collect(self) -> list[Delta]:
        """All choices, whole."""
        whole = [Delta() for _ in self.choices]
        async for index, delta in self.deltas():
            whole[index].add(delta)
        return whole

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`; the prompt is counted once, however many choices it has."""
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        prompt_tokens -= self._shared_tokens * (len(self.prompts) - 1)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        firsts = self.choices[:: self.n]
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(choice.cached_tokens for choice in firsts),
                "virtual_tokens": sum(choice.virtual_tokens for choice in firsts),
            },
        }

    def _time(self, index: int, tokens: Tokens) -> None:
        now = time.perf_counter()
        clock = self._clocks[index]
        if not self._has_begun:
            self._has_begun = True
            self._metrics.first_token(now - self._arrived.at)
        if not clock.first:
            clock.first = now
            self._metrics.cached_tokens(tokens.cached_tokens)
        clock.last = now

    def _finish(self, index: int) -> None:
        self._unfinished -= 1
        clock = self._clocks[index]
        self._metrics.output_tokens(clock.last - clock.first, self.choices[index].num_tokens)
