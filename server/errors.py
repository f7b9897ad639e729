"""Every error that Medley answers with, on one page.

    MedleyError
    ├── RequestError     what one caller asked for cannot be served; carries a stable `code`
    │   ├── AdapterError  an adapter's files are wrong, unsupported or do not fit the base
    │   └── QuotaError    the caller's API key has used what it may
    └── StartupError     the server cannot start as configured; the message says how to mend it

A `RequestError` crosses from the engine process to the HTTP process as its three fields; `server.api.errors`
holds the one table that turns a code into an HTTP status. The store has its own tree in
`adapters_store.errors`, since it knows nothing of the server.
"""

from __future__ import annotations


class MedleyError(Exception):
    """Base of the tree. `str(error)` is a sentence for a person."""


class RequestError(MedleyError):
    """A request (or upload) that cannot be served.

    `code` is a stable snake_case word of the public contract, `param` the field at fault, if one is.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class AdapterError(RequestError):
    """An adapter that is refused: `code` is one of the contract's bad-upload codes."""


class QuotaError(RequestError):
    """A quota that is used up: `param` is its name, `retry_after` the seconds until asking again is worth it."""

    def __init__(self, quota: str, message: str, retry_after: int) -> None:
        super().__init__("quota_exceeded", message, quota)
        self.retry_after = retry_after


class StartupError(MedleyError):
    """Start-up is refused; the command line prints the message and exits with status 1."""
