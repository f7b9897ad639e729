"""From the settings to what the engine is told: bytes for GiB, folders for names, the bundled base for no base."""

from __future__ import annotations

from pathlib import Path

from adapters_store import BlobStore, DataFolder, blobs_url, open_blobs
from server.engine.protocol import Configure
from server.errors import StartupError
from server.settings import GIB, Settings
from server.supervisor.demo_tasks import DEMO_BASE_ID, demo_base


def store_url(settings: Settings, data: DataFolder) -> str:
    """Where the adapters' files are. Raises `StartupError` for what is no such place."""
    if settings.store is None:
        return str(data.blobs)
    try:
        return blobs_url(settings.store)
    except ValueError as error:
        raise StartupError(f"--store: {error}") from error


def blob_store(settings: Settings, data: DataFolder) -> BlobStore:
    """The adapters' files, for this process; the engine process opens the same place and the same cache."""
    return open_blobs(store_url(settings, data), data.blob_cache, int(settings.store_cache * GIB))


def engine_configuration(settings: Settings, data: DataFolder) -> Configure:
    """What the engine runs with. Raises `StartupError` where no base is given and none is bundled."""
    if settings.model is None:
        model, base_id = str(demo_base()), DEMO_BASE_ID
    else:
        model, base_id = settings.model, base_id_of(settings.model)
    kv_cache = settings.kv_cache_memory
    return Configure(
        model=model,
        base_id=base_id,
        device=settings.device,
        dtype=settings.dtype,
        max_seqs=settings.max_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        max_prefill_tokens=settings.max_prefill_tokens,
        max_model_len=settings.max_model_len,
        kv_cache_bytes=None if kv_cache is None else int(kv_cache * GIB),
        adapter_bytes=int(settings.adapter_memory * GIB),
        page_size=settings.page_size,
        max_queue=settings.max_queue,
        blobs=store_url(settings, data),
        blob_cache=str(data.blob_cache),
        blob_cache_bytes=int(settings.store_cache * GIB),
        cache=str(data.cache),
        log_level=settings.log_level,
        log_format=settings.log_format,
    )


def base_id_of(model: str) -> str:
    """The id that clients use: a folder's last name, or the hub id."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model
