"""Loads of adapters under way, on threads beside the steps; and those that failed, which rest before the next try.

An adapter that cannot be loaded (a blob is missing or altered, say) is *quarantined*: everybody who wants it hears the
same error at once, and nobody's wish reads it again before `RETRY_SECONDS` have passed or somebody says that its
blobs were healed.

Everything but the loads runs on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from server.adapters.resident import Loaded
from server.errors import RequestError

logger = logging.getLogger("medley.bank")

RETRY_SECONDS = 5.0  # that a failed adapter rests
_THREADS = 2


@dataclass(frozen=True)
class AdapterKey:
    """An adapter by content."""

    digest: str
    files: Mapping[str, str]  # file name → sha256 of its blob


@dataclass
class _Load:
    key: AdapterKey
    future: Future[Loaded]
    started: float
    seconds: float = 0.0
    ended: bool = False  # when the look under way began: all tickets of a look see the same


@dataclass(frozen=True)
class _Failure:
    key: AdapterKey
    error: RequestError
    until: float  # by the clock


class Loads:
    """See the module."""

    def __init__(
        self,
        load: Callable[[Mapping[str, str]], Loaded],
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load` reads an adapter by its files' blobs and may raise; `wake` is called from a thread when one has
        ended."""
        self._load = load
        self._wake = wake
        self._clock = clock
        self._loads: dict[str, _Load] = {}
        self._failures: dict[str, _Failure] = {}
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="adapter-load")

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, digest: object) -> bool:
        return digest in self._loads

    @property
    def has_ended(self) -> bool:
        """Whether one has ended that nobody has looked at."""
        return any(load.future.done() for load in self._loads.values())

    def look(self) -> None:
        """Note which have ended; what failed is in quarantine from here on."""
        for digest, load in list(self._loads.items()):
            load.ended = load.future.done()
            if load.ended and (error := load.future.exception()) is not None:
                del self._loads[digest]
                self._quarantine(load.key, error)

    def start(self, key: AdapterKey) -> None:
        """Begin to load; not what is under way or rests."""
        load = _Load(key, self._threads.submit(self._load, key.files), time.perf_counter())
        self._loads[key.digest] = load

        def ended(_: Future[Loaded]) -> None:
            load.seconds = time.perf_counter() - load.started
            self._wake()

        load.future.add_done_callback(ended)

    def arrived(self, digest: str) -> Loaded | None:
        """The adapter if its load had ended at the last look."""
        load = self._loads.get(digest)
        return load.future.result() if load is not None and load.ended else None

    def take(self, digest: str) -> float:
        """Forget a load that has ended; the seconds it took."""
        return self._loads.pop(digest).seconds

    def error(self, digest: str) -> RequestError | None:
        """Why an adapter cannot be had at present, if it rests."""
        failure = self._failures.get(digest)
        return failure.error if failure is not None and self._clock() < failure.until else None

    def heal(self, blobs: Collection[str]) -> None:
        """These blobs are whole again: what has one of them may be loaded at once."""
        for digest, failure in list(self._failures.items()):
            if any(blob in blobs for blob in failure.key.files.values()):
                del self._failures[digest]

    def forget_all_but(self, wanted: Collection[str]) -> None:
        """Drop ended loads that nobody wants: they would hold their place for ever."""
        for digest in [digest for digest, load in self._loads.items() if load.ended and digest not in wanted]:
            del self._loads[digest]

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _quarantine(self, key: AdapterKey, error: BaseException) -> None:
        if not isinstance(error, RequestError):  # out of memory, say: its own requests fail, nobody else's
            logger.error("an adapter's load failed unexpectedly", exc_info=error)
            error = RequestError("adapter_unavailable", f"the adapter cannot be loaded: {error!r}")
        logger.warning("adapter %s rests for %g s: %s", key.digest, RETRY_SECONDS, error)
        now = self._clock()
        self._failures = {digest: failure for digest, failure in self._failures.items() if now < failure.until}
        self._failures[key.digest] = _Failure(key, error, now + RETRY_SECONDS)
