"""How much one HTTP request may ask for."""

from __future__ import annotations

from server.errors import RequestError
from server.settings import Settings


def check_counts(settings: Settings, *, prompts: int = 1, n: int = 1, param: str = "prompt") -> None:
    """Refuse more prompts (in the field `param`), choices or sequences than the server takes at once."""
    if prompts > settings.max_batch_requests:
        message = f"{param}: {prompts} are more than the {settings.max_batch_requests} that one HTTP request may have"
        raise RequestError("invalid_request", message, param)
    if n > settings.max_choices:
        message = f"n: {n} choices are more than the {settings.max_choices} that one HTTP request may have"
        raise RequestError("invalid_request", message, "n")
    if prompts * n > settings.max_queue:
        message = f"n: {prompts} prompts × {n} choices are more than the {settings.max_queue} places of the queue"
        raise RequestError("invalid_request", message, "n")
