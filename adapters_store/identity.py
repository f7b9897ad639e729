"""What makes two uploads the same adapter. It reads no files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from adapters_store.records import FileRecord

#: The files that may define an adapter: its config, weights and head under the names that libraries give them, and what
#: the server found out when they were uploaded. Others (README.md) are stored with it and are no part of its identity.
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter.safetensors",
    "head_config.json",
    "model_head.safetensors",
    "medley.json",
)


def adapter_digest(files: Mapping[str, FileRecord]) -> str:
    """An adapter's identity: the sha256 of one line "name sha256" for each of `ADAPTER_FILES` that it has, in this
    order."""
    manifest = "".join(f"{name} {files[name].sha256}\n" for name in ADAPTER_FILES if name in files)
    return hashlib.sha256(manifest.encode()).hexdigest()
