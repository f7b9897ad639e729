"""Publishes that die: one per line of the store's code that a publish runs, killed just before that line.

    python -m tests.store.publish_until_killed URL NAMESPACE BLOBS

Each publish runs in a fork of its own and is of its own task, "step-K", which is also its content. It prints K when
that fork was killed, and ends after the first fork that lived to be acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import adapters_store
from adapters_store import LocalBlobs, RedisIndex
from tests.store.samples import publish_text

STORE = str(Path(adapters_store.__file__).parent)


def kill_at(step: int) -> None:
    """Count the lines of the store that any thread runs, and die like by `kill -9` at the given one."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(STORE):
            return None
        if event == "line":
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


async def publish(url: str, namespace: str, blobs: Path, step: int) -> None:
    index = await RedisIndex.connect(url, namespace=namespace)
    store = LocalBlobs(blobs)
    kill_at(step)
    await publish_text(index, store, f"step-{step}", f"step-{step}")


def main() -> None:
    url, namespace, blobs = sys.argv[1:]
    for step in range(1, 10_000):
        child = os.fork()
        if child == 0:
            asyncio.run(publish(url, namespace, Path(blobs), step))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            print(step, flush=True)
        else:
            sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
