"""A synchronous client of a server's HTTP interface, for the commands.

It finds the server (`--url`, `MEDLEY_URL`, the key by `MEDLEY_API_KEY`) and turns every way in which a call can
fail into a `CommandError` that a person can act on. It knows neither torch nor the server's own parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Annotated, Any
from urllib.parse import quote

import httpx
import typer

from server.cli.errors import CommandError
from server.settings import ClientSettings

# The server ends every request by its own deadline (600 s by default); this only catches a machine that is gone.
_READ_SECONDS = 3600.0
_CONNECT_SECONDS = 5.0

Url = Annotated[
    str | None,
    typer.Option("--url", help="The server (default: MEDLEY_URL, else http://127.0.0.1:8000).", show_default=False),
]
Json = dict[str, Any]


class Address:
    """Where the server is, and how it is spoken to."""

    def __init__(self, url: str | None = None) -> None:
        """`url` wins over `MEDLEY_URL`. Raises `typer.BadParameter` for what is not an HTTP URL."""
        settings = ClientSettings.model_validate({} if url is None else {"url": url})
        self.url = settings.url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise typer.BadParameter(f"{self.url!r} is not an http:// or https:// URL", param_hint="--url")
        self.headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self.timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)


class Client:
    """Calls to one server; use it in a `with` block."""

    def __init__(self, url: str | None = None) -> None:
        """`url` wins over `MEDLEY_URL`. Raises `typer.BadParameter` for what is not an HTTP URL."""
        address = Address(url)
        self.url = address.url
        self._http = httpx.Client(base_url=address.url, headers=address.headers, timeout=address.timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, str | int | bool] | None = None,
        body: Json | None = None,
        files: Sequence[tuple[str, IO[bytes]]] | None = None,
    ) -> Any:
        """One call; its JSON answer, None for 204. `files` are sent as multipart parts named `files`, streamed.

        Raises `CommandError` with the server's own message, or with why it could not be reached.
        """
        parts = None if files is None else [("files", (name, content)) for name, content in files]
        with expressed(self.url):
            response = self._http.request(method, path, params=params, json=body, files=parts)
        if response.is_error:
            raise refusal(response)
        return response.json() if response.content else None

    def download(self, path: str, target: IO[bytes]) -> None:
        """GET a file and write it to `target` as it comes. Raises `CommandError` as `call` does."""
        with expressed(self.url), self._http.stream("GET", path) as response:
            if response.is_error:
                response.read()
                raise refusal(response)
            for chunk in response.iter_bytes():
                target.write(chunk)

    def stream(self, path: str, body: Json) -> Iterator[Json]:
        """POST, then the events of the server-sent stream as they come, without the closing `[DONE]`.

        Raises `CommandError` as `call` does, and for an `error` event and a stream that breaks off.
        """
        with expressed(self.url), self._http.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise refusal(response)
            for data in _events(response):
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise CommandError(_sentence(event["error"]))
                yield event
        raise CommandError(f"the server at {self.url} ended the answer too early; look at its log")


@contextmanager
def expressed(url: str) -> Iterator[None]:
    """Turn what httpx says of the network on the way to `url` into a `CommandError` with a way out."""
    try:
        yield
    except httpx.InvalidURL as error:
        raise CommandError(f"{url} is not a usable URL: {error}; set --url or MEDLEY_URL") from None
    except httpx.ConnectError:
        raise CommandError(f"no server at {url}; start one with `medley serve` or set --url/MEDLEY_URL") from None
    except httpx.TimeoutException:
        raise CommandError(f"the server at {url} does not answer; is it the right --url?") from None
    except httpx.TransportError as error:
        raise CommandError(f"the connection to {url} broke ({error}); look at the server's log") from None


def task_path(task: str, *rest: str) -> str:
    """The path of a task's resource; names are quoted, so that any typed name reaches the server whole."""
    return _path("/v1/tasks", task, *rest)


def user_task_path(user: str, task: str) -> str:
    """The path of a user's customization of a task."""
    return _path("/v1/users", user, "tasks", task)


def _path(*parts: str) -> str:
    first, *names = parts
    return "/".join([first, *(quote(name, safe=":") for name in names)])


def _events(response: httpx.Response) -> Iterator[str]:
    """The `data:` lines of a server-sent stream. Split by hand: `iter_lines` also splits at U+2028 and its like,
    which JSON may contain."""
    buffer = b""
    for chunk in response.iter_bytes():
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()


def refusal(response: httpx.Response) -> CommandError:
    """The server's error as a sentence; what is not in its format came from something in between."""
    try:
        return CommandError(_sentence(response.json()["error"]))
    except (ValueError, KeyError, TypeError):
        return CommandError(
            f"{response.url} answered {response.status_code} {response.reason_phrase}, "
            "which is no answer of a Medley server; is it the right --url?"
        )


def _sentence(error: Json) -> str:
    return f"{error['message']} ({error['code']})"
