"""`python -m benchmarks.cold`: what does it cost that an adapter is only on the local disk?

Soft prompts of 20 tokens, each used once, half of them pinned beforehand: resident, but without prefix pages, so that
cold and resident requests alike run the prompt's tokens in their first step. The rest is in a blob store's folder, and
what the system has cached of its files is dropped. The engine runs in its own loop on a thread, as in its process; the
loader reads, verifies and parses as the process's does.

Measured per request: from sending it to its first token, in an idle engine and beside one running stream; there also
the longest pause between two of the stream's tokens until then.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from statistics import median

import torch
import typer
from safetensors.torch import save_file

from adapters_store import LocalBlobs
from benchmarks.bases import SIZES, random_base
from benchmarks.frame import Case, Figure, Quick, Report, Rounds, Save, Table, Target, Threads, alternate, machine
from benchmarks.inprocess import Size, engine_limits, prepare
from server.adapters import Adapter, Checkpoint, read_adapter
from server.engine.engine import Engine
from server.engine.loop import EngineLoop
from server.engine.protocol import Abort, AdapterRef, Generate, Pin, Sampling, StepOutput
from server.model import FrozenBase

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

LATER_MS = Target(10.0, at_most=True)
PAUSE_STEPS = Target(1.0, at_most=True)
VIRTUAL_TOKENS = 20
PROMPT_TOKENS = 16
_MAX_LENGTH = 512
_PAGES = 4096
_CASES = ("resident", "cold", "resident beside a stream", "cold beside a stream")


class Store:
    """Soft prompts as blobs in a folder."""

    def __init__(self, folder: Path, width: int) -> None:
        self._blobs = LocalBlobs(folder)
        self._width = width

    def add(self, number: int) -> AdapterRef:
        """A new one; `number` is its seed."""
        values = torch.randn(VIRTUAL_TOKENS, self._width, generator=torch.Generator().manual_seed(number))
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": VIRTUAL_TOKENS, "num_transformer_submodules": 1}
        files: dict[str, str] = {}
        with self._blobs.staging() as folder:
            save_file({"prompt_embeddings": values}, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config))
            for path in sorted(folder.iterdir()):
                files[path.name] = self._blobs.put(path).sha256
        return AdapterRef(digest=f"prompt {number}", files=files)

    def load(self, base: FrozenBase, files: Mapping[str, str]) -> Adapter:
        """As the engine process does it."""
        contents = {name: self._blobs.read(sha256) for name, sha256 in files.items()}
        return read_adapter(Checkpoint.parse(contents, base.dtype), base.shape)

    def drop_cached(self, adapter: AdapterRef) -> None:
        """Leave its files on the disk alone."""
        for sha256 in adapter.files.values():
            descriptor = os.open(self._blobs.path(sha256), os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@dataclass(frozen=True)
class First:
    """A request's first token."""

    seconds: float  # from sending the request
    pause: float  # the stream's longest between two of its tokens meanwhile; 0 without a stream
    step: float  # the stream's median pause before the request came


class Served:
    """An engine in its loop on a thread."""

    def __init__(self, base: FrozenBase, store: Store) -> None:
        self._outputs: SimpleQueue[tuple[float, StepOutput]] = SimpleQueue()
        self.loop = EngineLoop(lambda output: self._outputs.put((time.perf_counter(), output)), iter(()))
        self._engine = Engine(base, engine_limits(_PAGES), partial(store.load, base), self.loop.wake)
        self._thread = threading.Thread(target=self.loop.run, args=(self._engine,))
        self._thread.start()
        self._count = 0

    def close(self) -> None:
        """End the loop and the engine."""
        self.loop.stop()
        self._thread.join()
        self._engine.close()

    def pin(self, adapters: list[AdapterRef]) -> None:
        """Return once they are resident."""
        self.loop.post(Pin(adapters=adapters))
        while self._next()[1].stats.bank_adapters < len(adapters):
            pass

    def first(self, adapter: AdapterRef, prompt: list[int]) -> First:
        """Ask for one token in an idle engine."""
        sent = self._send("asked", prompt, 1, adapter)
        at = self._until("asked")
        return First(at - sent, 0.0, 0.0)

    def first_beside_a_stream(self, adapter: AdapterRef, prompt: list[int]) -> First:
        """The same while somebody else is served."""
        self._send("stream", prompt, _MAX_LENGTH - len(prompt))
        plain = [self._until("stream") for _ in range(12)]
        sent = self._send("asked", prompt, 1, adapter)
        tokens = plain[-1:]
        while True:
            at, output = self._next()
            said = {tokens.id.partition(" ")[0] for tokens in output.tokens}
            tokens += [at] * ("stream" in said)
            if "asked" in said:
                break
        self.loop.post(Abort(id=f"stream {self._count - 1}"))
        while self._next()[1].stats.running:
            pass
        steps = [after - before for before, after in pairwise(plain)]
        pauses = [after - before for before, after in pairwise(tokens)]
        return First(at - sent, max(pauses), median(steps))

    def _send(self, name: str, prompt: list[int], new_tokens: int, *stack: AdapterRef) -> float:
        self._count += 1
        sampling = Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        request = Generate(
            id=f"{name} {self._count}", prompt=prompt, stack=stack, sampling=sampling, deadline=time.time() + 600
        )
        sent = time.perf_counter()
        self.loop.post(request)
        return sent

    def _next(self) -> tuple[float, StepOutput]:
        at, output = self._outputs.get(timeout=60)
        if output.failed:
            raise RuntimeError(f"the engine refused a request: {output.failed[0].message}")
        return at, output

    def _until(self, name: str) -> float:
        """When its next token came."""
        while True:
            at, output = self._next()
            if any(tokens.id.startswith(name) for tokens in output.tokens):
                return at


def measure(served: Served, store: Store, adapters: Iterator[AdapterRef], name: str, draw: random.Random) -> First:
    """One request of a case."""
    adapter = next(adapters)
    if name.startswith("cold"):
        store.drop_cached(adapter)
    prompt = [draw.randrange(1, SIZES["tiny"].vocabulary) for _ in range(PROMPT_TOKENS)]
    return served.first_beside_a_stream(adapter, prompt) if "stream" in name else served.first(adapter, prompt)


@contextmanager
def serving(base: FrozenBase, folder: Path, rounds: int) -> Iterator[tuple[Served, Store, dict[str, list[AdapterRef]]]]:
    """An engine with the resident ones pinned; each case's adapters."""
    store = Store(folder, base.shape.embedding_width)
    count = rounds + 1
    adapters = {
        name: [store.add(place * count + number) for number in range(count)] for place, name in enumerate(_CASES)
    }
    served = Served(base, store)
    try:
        served.pin([adapter for name in _CASES if name.startswith("resident") for adapter in adapters[name]])
        yield served, store, adapters
    finally:
        served.close()


def report(measured: Mapping[str, list[First]], facts: dict[str, object]) -> Report:
    """Medians over the rounds; what is compared is compared within a round."""

    def later(cold: str, resident: str) -> float:
        pairs = zip(measured[cold], measured[resident], strict=True)
        return 1e3 * median(one.seconds - other.seconds for one, other in pairs)

    pairs = zip(measured["cold beside a stream"], measured["resident beside a stream"], strict=True)
    longer = median((one.pause - other.pause) / one.step for one, other in pairs)
    rows = [
        (
            name,
            f"{1e3 * median(first.seconds for first in measured[name]):.2f}",
            f"{1e3 * median(first.pause for first in measured[name]):.2f}",
            f"{1e3 * median(first.step for first in measured[name]):.2f}",
        )
        for name in _CASES
    ]
    figures = [
        Figure(
            "a cold soft prompt's first token later than a resident one's", later("cold", "resident"), "ms", LATER_MS
        ),
        Figure(
            "the same beside a stream",
            later("cold beside a stream", "resident beside a stream"),
            "ms",
            LATER_MS,
        ),
        Figure("a stream's longest pause meanwhile, longer by", longer, "steps", PAUSE_STEPS),
    ]
    table = Table("medians in ms", ("request", "first token", "longest pause", "a step before it"), rows)
    return Report("cold", "Adapters that are only on disk", figures, facts, [table], rounds=len(measured["cold"]))


@app.command()
def main(
    size: Size = SIZES["tiny"],
    rounds: Rounds = 200,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """First tokens of cold and resident soft prompts, and what a running stream notices of them."""
    prepare(threads, is_saved=save)
    facts = machine()
    rounds = 3 if quick else rounds
    base = FrozenBase(random_base(size, _MAX_LENGTH))
    with tempfile.TemporaryDirectory() as folder, serving(base, Path(folder), rounds) as (served, store, adapters):
        cases = [Case(name, partial(measure, served, store, iter(adapters[name]), name), "all") for name in _CASES]
        report(alternate(cases, rounds), facts).finish(save)


if __name__ == "__main__":
    app()
