"""An upload's files, streamed from the request to a folder on disk; never whole in memory.

The body is read to its end even when a part is at fault, so that the client, which is still sending, gets to read
why; nothing more is written then, and the middleware bounds the body. What the files hold is the engine's to check.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters_store import ADAPTER_FILES
from server.api.derived import DERIVED_FILE
from server.errors import AdapterError, RequestError

if TYPE_CHECKING:  # the library has this name for type checkers only
    from python_multipart.multipart import MultipartCallbacks

CONFIG_FILE = "adapter_config.json"  # which other files there must be, it tells
ACCEPTED_FILES = (*(name for name in ADAPTER_FILES if name != DERIVED_FILE), "README.md")
_FIELD = "files"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


async def receive_files(content_type: str, body: AsyncIterable[bytes], folder: Path, max_bytes: int) -> int:
    """Write the multipart parts named `files` into `folder` by their own names; the sum of their sizes.

    Raises `AdapterError` (`missing_file`, `unknown_file`, `too_large`) or `RequestError` for what is no such body.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or b"boundary" not in options:
        message = (
            "an upload is multipart/form-data with parts named files: adapter_config.json, adapter_model.safetensors"
        )
        raise RequestError("unsupported_media_type", message)
    reception = _Reception(folder, max_bytes)
    parser = MultipartParser(options[b"boundary"], reception.callbacks())
    try:
        async for chunk in body:
            if chunk:
                parser.write(chunk)
                await asyncio.to_thread(reception.write)
        parser.finalize()
    except FormParserError as error:
        raise RequestError("invalid_request", f"the multipart body cannot be read: {error}") from error
    finally:
        await asyncio.to_thread(reception.close)
    reception.check()
    return reception.size


@dataclass
class _Part:
    """The part that is coming in. `file` is its file's name, None where its content is of no use."""

    header_name: bytes = b""
    header_value: bytes = b""
    disposition: bytes = b""
    file: str | None = None


@dataclass
class _Reception:
    """What has come so far. The parser's callbacks only note what to write; `write` does it, on a thread."""

    folder: Path
    max_bytes: int
    size: int = 0
    fault: RequestError | None = None  # the first
    part: _Part = field(default_factory=_Part)
    names: set[str] = field(default_factory=set)
    files: dict[str, IO[bytes]] = field(default_factory=dict)  # open, by name
    pending: list[tuple[str, bytes]] = field(default_factory=list)

    def callbacks(self) -> MultipartCallbacks:
        """For the parser."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
        }

    def write(self) -> None:
        """Write what the last chunk brought."""
        for name, data in self.pending:
            if name not in self.files:
                self.files[name] = (self.folder / name).open("wb")
            self.files[name].write(data)
        self.pending.clear()

    def close(self) -> None:
        """Nothing more is written."""
        for file in self.files.values():
            file.close()

    def check(self) -> None:
        """Everything has come: raise what was wrong with it."""
        if self.fault is not None:
            raise self.fault
        if CONFIG_FILE not in self.names:
            message = f"{CONFIG_FILE} is missing; upload the files of an adapter's folder: {', '.join(ACCEPTED_FILES)}"
            raise AdapterError("missing_file", message, _FIELD)

    def _begin(self) -> None:
        self.part = _Part()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self.part.header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self.part.header_value += data[start:end]

    def _header_end(self) -> None:
        if self.part.header_name.lower() == b"content-disposition":
            self.part.disposition = self.part.header_value
        self.part.header_name = self.part.header_value = b""

    def _open(self) -> None:
        _, options = parse_options_header(self.part.disposition)
        field_name = options.get(b"name", b"").decode(errors="replace")
        if field_name != _FIELD or b"filename" not in options:
            message = f"the part '{field_name}' is none of an upload's: each is a file in a part named files"
            self.fault = self.fault or RequestError("unknown_field", message, field_name or None)
            return
        name = options[b"filename"].decode(errors="replace")
        refusal = self._refusal(name)
        if refusal is not None:
            self.fault = self.fault or AdapterError("unknown_file", refusal, _FIELD)
            return
        self.part.file = name
        self.names.add(name)
        self.pending.append((name, b""))  # a file without content is a file too

    def _refusal(self, name: str) -> str | None:
        if name in self.names:
            return f"{name} came twice"
        if name in ACCEPTED_FILES:
            return None
        if name.endswith(_PICKLED):
            return f"{name}: pickled weights are never opened; save the adapter as safetensors, or use `medley convert`"
        return f"{name} is none of the files of an adapter: {', '.join(ACCEPTED_FILES)}"

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.size += end - start
        if self.size > self.max_bytes:
            message = f"the files have more than {self.max_bytes} bytes, which is the server's limit"
            self.fault = self.fault or AdapterError("too_large", message, _FIELD)
        if self.part.file is not None and self.fault is None:
            self.pending.append((self.part.file, data[start:end]))
