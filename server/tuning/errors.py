"""The errors of tuning. The command line prints their message and exits with status 1."""

from __future__ import annotations

from server.errors import MedleyError


class TuneError(MedleyError):
    """Tuning cannot be done as asked; the message names the setting, or the line of the data, and the way out."""
