"""What the HTTP side works with: one explicit object, built by whoever starts the server.

The application exists before the engine is ready, so that `/healthz` answers from the first second: `base` is None
until `serve` is called, and generating requests answer 503 `not_ready` until then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from adapters_store import ApiKeyDirectory, BlobStore, CustomizationDirectory, RedisIndex, TaskDirectory
from server.api.last_used import LastUsed
from server.api.metrics import Metrics
from server.api.pins import Engine, Pins
from server.api.quotas import QuotaKeeper
from server.api.templates import PromptTemplate
from server.api.text import BaseTokenizer
from server.engine.client import EngineClient
from server.engine.protocol import BaseFacts
from server.errors import RequestError
from server.settings import GIB, Settings


class ServedBase:
    """The base as the HTTP side knows it: the engine that runs it, its facts, its tokenizer and chat template."""

    def __init__(self, engine: EngineClient, facts: BaseFacts) -> None:
        """`engine` has said that it is ready, and these facts with it."""
        self.engine = engine
        self.created = int(time.time())
        self.facts = facts
        self.tokenizer = None if facts.tokenizer is None else BaseTokenizer(facts.tokenizer)

    @cached_property
    def chat_template(self) -> PromptTemplate | None:
        """Compiled when the first chat asks for it. Raises `RequestError` where it is not valid Jinja."""
        source = self.facts.chat_template
        return None if source is None else PromptTemplate(source, param="messages", chat=True)

    def require_tokenizer(self, param: str) -> BaseTokenizer:
        """The tokenizer; `RequestError` naming `param` where the base has none."""
        if self.tokenizer is None:
            message = f"{param}: the base has no tokenizer, so it takes token ids only"
            raise RequestError("no_tokenizer", message, param)
        return self.tokenizer


@dataclass
class Services:
    """See the module. `base` to `open_uploads` change while the server runs; what stands below them
    follows from the others."""

    settings: Settings
    index: RedisIndex
    directory: TaskDirectory
    blobs: BlobStore
    metrics: Metrics
    last_used: LastUsed
    base: ServedBase | None = None
    ready: bool = False  # set once whatever start-up publishes is published
    draining: bool = False  # set on shutdown: new requests are refused
    open_requests: int = 0  # under way, streams until their end
    open_uploads: int = 0
    api_keys: ApiKeyDirectory = field(init=False)
    quotas: QuotaKeeper = field(init=False)
    customizations: CustomizationDirectory = field(init=False)
    pins: Pins = field(init=False)

    def __post_init__(self) -> None:
        self.api_keys = ApiKeyDirectory(self.index.api_keys)
        self.directory.subscribe(self.api_keys)
        self.quotas = QuotaKeeper(self.index.usage, lambda: self.directory.available)
        self.customizations = CustomizationDirectory(self.index, self.directory)
        self.directory.subscribe(self.customizations)
        self.pins = Pins(self.directory, int(self.settings.adapter_memory * GIB))

    def serve(self, engine: EngineClient, facts: BaseFacts) -> None:
        """The engine is ready: requests can be answered."""
        self.base = ServedBase(engine, facts)
        self.pins.look_soon()

    @contextmanager
    def upload(self) -> Iterator[None]:
        """Hold one of the places for uploads, each of which may fill the disk by its limit; `RequestError` without."""
        if self.open_uploads >= self.settings.max_uploads:
            message = f"{self.open_uploads} uploads are under way, which is the server's limit; ask again soon"
            raise RequestError("too_many_uploads", message)
        self.open_uploads += 1
        try:
            yield
        finally:
            self.open_uploads -= 1

    def pinning_engine(self) -> Engine | None:
        """Who is to hear of pins; None while the base is loading."""
        return None if self.base is None else (self.base.engine, self.base.facts)

    def require_base(self) -> ServedBase:
        """The base; `RequestError` while it is loading."""
        if self.base is None:
            raise RequestError("not_ready", "the base is still loading; ask again soon")
        return self.base

    def why_not_ready(self) -> str | None:
        """What is missing for `/readyz`; None when nothing is."""
        if self.base is None:
            return "the base is loading"
        if not self.base.engine.alive:
            return "the engine is gone"
        if self.draining:
            return "the server is shutting down"
        return None if self.ready else "the server is publishing its first tasks"
