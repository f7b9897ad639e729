"""The base's fingerprint: a hash of its config and weights, by which versions say which base they were made for.

Hashing many gigabytes takes a while, so the result is kept in a cache folder under the files' names, sizes and
modification times; any change of those computes it anew.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from server.errors import StartupError

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_folder(model: str) -> Path:
    """The local folder of a model named by folder or hub id; a hub id is downloaded if it is not yet here."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StartupError(
            f"--model {model}: no such folder here, and the hub gives no such model ({type(error).__name__})"
        ) from error


def fingerprint(folder: Path, cache: Path) -> str:
    """sha256 (hex) over the names and contents of `config.json` and all safetensors files."""
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    stats = [(file.name, file.stat()) for file in files]
    state = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]) + str(folder.resolve())
    cached = cache / f"fingerprint-{hashlib.sha256(state.encode()).hexdigest()[:32]}"
    if cached.exists():
        return cached.read_text()
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    cache.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(".tmp")
    temporary.write_text(whole.hexdigest())
    temporary.replace(cached)
    return whole.hexdigest()
