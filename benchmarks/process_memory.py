"""A process's memory, as Linux counts it; this one's, and the peak of one that loads a base.

RssAnon is what a process has for itself. Mapped files (a safetensors file while it is read, the libraries' code) are
the system's to drop at any time; they are in VmHWM, the highest resident size, which is given beside it.
"""

from __future__ import annotations

import ctypes
import gc
import select
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_INTERVAL_SECONDS = 0.001
_KIB = 1024
_LOAD = """
import sys
from pathlib import Path
from server.model import FrozenBase
base = FrozenBase.load(Path(sys.argv[1]), device="cpu", dtype="float32", max_model_len=None)
print("loaded", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Peak:
    """The most that a process had, in bytes."""

    anonymous: int  # its own
    resident: int  # with mapped files


def anonymous_bytes() -> int:
    """This process's own memory now, garbage left out."""
    gc.collect()
    return _status("self")["RssAnon"]


def return_freed_memory() -> None:
    """Give the system what this process has freed, so that using it again shows as growth. glibc only."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def load_peak(folder: Path) -> Peak:
    """Load the base in `folder` in a fresh process, as the engine does."""
    command = [sys.executable, "-c", _LOAD, str(folder)]
    anonymous = resident = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        while not select.select([child.stdout], [], [], _INTERVAL_SECONDS)[0]:
            status = _status(str(child.pid))
            anonymous = max(anonymous, status.get("RssAnon", 0))
            resident = max(resident, status.get("VmHWM", 0))
        loaded = child.stdout.readline()
        child.stdin.close()
    if not loaded:  # its output ended instead
        raise RuntimeError(f"the process that loads {folder} ended with status {child.returncode}")
    return Peak(anonymous, resident)


def _status(process: str) -> dict[str, int]:
    """Bytes by name, of `/proc/PROCESS/status`; empty of memory once the process has ended."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    parts = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) * _KIB for name, size, _ in parts}
