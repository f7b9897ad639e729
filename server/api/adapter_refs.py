"""An adapter of the index, as the engine names it."""

from __future__ import annotations

from adapters_store import ADAPTER_FILES, Customization, Version
from server.engine.protocol import AdapterRef


def adapter_of(record: Version | Customization) -> AdapterRef:
    """A version's or a customization's adapter, for the engine."""
    files = {name: record.files[name].sha256 for name in ADAPTER_FILES if name in record.files}
    return AdapterRef(record.digest, files)
