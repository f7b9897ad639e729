"""The engine process as a child: spawned on one end of a socket pair, watched, stopped.

It ends with this process: it sees the end of its socket, and on Linux the kernel kills it, also while it still
loads. What it says is `EngineClient`'s matter.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping

import structlog

from adapters_store import signalled_at_parent_death
from server.engine.client import EngineClient, StepHook
from server.engine.protocol import BaseFacts, Configure

STOP_SECONDS = 10.0  # for the step under way
SPIN_COUNT = 40_000
"""How often a thread of GNU OpenMP looks for work before it sleeps: for about 2 ms, longer than a step's Python takes.
Its own 300,000 hold a core for 16 ms, also from a thread that all wait for and that stands in line behind another
process."""

_log = structlog.get_logger(__name__)


class EngineChild:
    """One engine process and the client that speaks to it."""

    def __init__(self, process: subprocess.Popen[bytes], client: EngineClient, configure: Configure) -> None:
        """Use `spawn`."""
        self.client = client
        self._process = process
        self._ready = asyncio.create_task(client.start(configure), name="engine start")

    @classmethod
    async def spawn(cls, configure: Configure, on_step: StepHook) -> EngineChild:
        """Start the process and send it its settings; it loads from now on. Call it from the main thread: the kernel
        takes the death of the spawning thread for the parent's.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = _start_process(theirs.fileno())
        return cls(process, await EngineClient.connect(ours, on_step), configure)

    async def ready(self) -> BaseFacts:
        """Wait until it steps. Raises `StartupError` with the engine's own words."""
        return await asyncio.shield(self._ready)

    async def ended(self) -> str:
        """Wait for its end; why it ended, as far as that is known."""
        words = await self.client.closed()
        status = await self._exit_status()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"the engine process {how}" + (f": {words}" if words else "")

    async def stop(self) -> None:
        """End it; what is open at its client ends with an error."""
        if not self._ready.done():  # it has nothing to finish, and would first load to the end
            self._process.kill()
        await self.client.close()
        await asyncio.gather(self._ready, return_exceptions=True)  # whoever waited for it has been told
        await self._exit_status()

    async def _exit_status(self) -> int:
        """Wait for the process, whose socket is closed; one that stays is killed."""
        try:
            return await asyncio.to_thread(self._process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            _log.warning("the engine did not stop by itself and is killed", seconds=STOP_SECONDS)
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """This process's variables, with `SPIN_COUNT` unless they say themselves how OpenMP's threads wait."""
    if "GOMP_SPINCOUNT" in environment or "OMP_WAIT_POLICY" in environment:
        return dict(environment)
    return {**environment, "GOMP_SPINCOUNT": str(SPIN_COUNT)}


def _start_process(descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: a folder `server` where the command was run is not ours
        [sys.executable, "-P", "-m", "server.engine", str(descriptor)],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),  # this process's stdout is for the line that it is ready
        pass_fds=[descriptor],
        env=engine_environment(os.environ),
        start_new_session=True,
        preexec_fn=signalled_at_parent_death(signal.SIGKILL),  # noqa: PLW1509 - it takes no lock: one system call
    )
