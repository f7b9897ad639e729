"""The command `medley`: `serve` runs a server in this process, everything else is a client of one.

Exit status: 0 done, 1 failed (one line on stderr says what and how to mend it), 2 wrong usage. Each command is
one function in the module of its name. Client commands import neither torch nor the server's parts, so that
they answer at once; `serve` and `tune` import what they need when they run.
"""

from __future__ import annotations

from server.cli.app import main

__all__ = ["main"]
