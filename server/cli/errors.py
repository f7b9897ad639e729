"""The one failure that a command reports: a sentence that says what failed and how to mend it."""

from __future__ import annotations

from server.errors import MedleyError


class CommandError(MedleyError):
    """Ends the command with exit status 1; the message is the one line on stderr."""
