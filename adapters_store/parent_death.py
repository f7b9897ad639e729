"""Children that do not outlive their parent, however it dies.

On Linux only: elsewhere what a killed parent left is dealt with at the next start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def signalled_at_parent_death(number: signal.Signals) -> Callable[[], None] | None:
    """What a child calls between fork and exec (`preexec_fn`) to get this signal when its parent dies.

    The kernel takes the death of the thread that forks for the parent's. Everything is looked up here, so that as
    little as possible happens after the fork.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask_for_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before the request took hold
            os._exit(1)

    return ask_for_signal
