"""The engine process: one end of a socket, the base, and the loop between them.

Threads: this one steps and says what happened; a reader takes messages off the socket; a writer waits for a slow HTTP
process, so that no step does; a few check uploads and load adapters. When the other side of the socket is gone, so is
this process.
"""

from __future__ import annotations

import gc
import logging
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from adapters_store import StoreUnavailable, VersionCorrupt, open_blobs
from server.adapters import METHODS, Adapter, Checkpoint, MethodFacts, read_adapter, why_no_stack
from server.adapters.shared import shared_bytes
from server.engine.channel import Channel
from server.engine.engine import Engine, EngineLimits
from server.engine.loop import EngineLoop
from server.engine.neighbours import layer_norms, virtual_tokens
from server.engine.protocol import (
    Abort,
    AdapterFacts,
    BaseFacts,
    Configure,
    Failed,
    Fatal,
    Generate,
    Healed,
    Inspect,
    Inspected,
    MethodEntry,
    Neighbours,
    NeighboursFound,
    Pin,
    Ready,
    ToEngine,
)
from server.errors import AdapterError, RequestError, StartupError
from server.logs import configure_logging
from server.model import FrozenBase, KVCache
from server.model.fingerprint import fingerprint, resolve_folder
from server.model.heap import moves_to_huge_pages

logger = logging.getLogger("medley.engine")

_KV_SHARE = 0.25  # of the free memory, where no size is set

# Prompt positions that a step computes beside the running streams, where no number is set: enough for the matrix
# products to run at their full rate, and no more, since every stream waits for them. On a CPU that is from about 128
# rows on; measured on two cores with a base of 91 M parameters, such a step takes at most five times as long as one
# that decodes 32 streams.
PREFILL_TOKENS = {"cpu": 144, "cuda": 2048}


def main(descriptor: int) -> int:
    """Serve the socket until the other side is gone; the exit status."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    channel: Channel[ToEngine] = Channel(socket.socket(fileno=descriptor), ToEngine)
    first = channel.receive()
    if not isinstance(first, Configure):
        return 0  # the parent went before it said anything
    configure_logging(first.log_level, first.log_format)
    try:
        process = EngineProcess(channel, first)
    except StartupError as error:
        channel.send(Fatal(message=str(error)))
        return 1
    process.run()
    return 0


class EngineProcess:
    """A loaded engine on a channel."""

    def __init__(self, channel: Channel[ToEngine], settings: Configure) -> None:
        """Load, probe and say `Ready`. Raises `StartupError`."""
        self._channel = channel
        self._checks = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload-check")
        self._blobs = open_blobs(settings.blobs, Path(settings.blob_cache), settings.blob_cache_bytes)
        if settings.max_batch_tokens < settings.max_seqs:
            raise StartupError(
                f"--max-batch-tokens {settings.max_batch_tokens} is less than --max-seqs {settings.max_seqs}: every "
                "running request needs a token of each step"
            )
        folder = resolve_folder(settings.model)
        self._base = FrozenBase.load(
            folder, device=settings.device, dtype=settings.dtype, max_model_len=settings.max_model_len
        )
        limits = _limits(settings, self._base)
        at_rest = moves_to_huge_pages() if self._base.device.type == "cpu" else iter(())
        self._loop = EngineLoop(channel.send_nowait, at_rest)
        self._engine = Engine(self._base, limits, self._load_adapter, self._loop.wake)
        # The base and the libraries stay as long as the process: a collection that visits all of their objects again
        # would hold a step for some tenths of a second.
        gc.collect()
        gc.freeze()
        channel.send(Ready(base=_facts(settings, self._base, folder, limits)))

    def run(self) -> None:
        """Step until the other side is gone."""
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()
        self._loop.run(self._engine)
        self._engine.close()

    def _read(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                match message:
                    case Generate() | Abort() | Pin() | Healed():
                        self._loop.post(message)
                    case Inspect():
                        self._checks.submit(self._inspect, message)
                    case Neighbours():
                        self._checks.submit(self._find_neighbours, message)
                    case Configure():
                        raise AssertionError("Configure comes once, first")
        finally:
            self._loop.stop()

    def _write(self) -> None:
        try:
            with suppress(OSError):  # the other side is gone
                self._channel.flush_pending()
        finally:
            self._loop.stop()  # an engine that cannot say anything more must not stay

    def _inspect(self, message: Inspect) -> None:
        try:
            room = self._engine.bank.capacity
            adapter = read_adapter(Checkpoint.open(Path(message.folder), self._base.dtype, room), self._base.shape)
            self._check_size([adapter])
            if message.under is not None:
                self._check_stack([self._load_adapter(message.under.files), adapter])
        except RequestError as error:
            failed = Failed(id=message.id, code=error.code, message=error.message, param=error.param)
            self._channel.send_nowait(Inspected(id=message.id, error=failed))
        except Exception as error:  # whatever an upload does to its check, its uploader gets an answer
            logger.exception("an upload's check failed unexpectedly")
            failed = Failed(id=message.id, code="bad_config", message=f"the adapter cannot be read: {error!r}")
            self._channel.send_nowait(Inspected(id=message.id, error=failed))
        else:
            self._channel.send_nowait(Inspected(id=message.id, facts=_adapter_facts(adapter)))

    def _find_neighbours(self, message: Neighbours) -> None:
        try:
            adapter = self._load_adapter(message.adapter.files)
            tokens = virtual_tokens(adapter, self._base, message.k)
            found = NeighboursFound(id=message.id, tokens=tokens, layers=layer_norms(adapter))
        except RequestError as error:
            failed = Failed(id=message.id, code=error.code, message=error.message, param=error.param)
            found = NeighboursFound(id=message.id, error=failed)
        except Exception as error:  # whoever asks gets an answer
            logger.exception("neighbours could not be found")
            failed = Failed(id=message.id, code="internal_error", message=f"neighbours could not be found: {error!r}")
            found = NeighboursFound(id=message.id, error=failed)
        self._channel.send_nowait(found)

    def _check_stack(self, stack: list[Adapter]) -> None:
        """Refuse what cannot be laid over the task's adapter."""
        reason = why_no_stack(stack)
        if reason is not None:
            raise AdapterError("cannot_compose", reason, "mode")
        self._check_size(stack)

    def _check_size(self, stack: list[Adapter]) -> None:
        """Refuse what fits the base but could never be served here."""
        virtual_tokens = sum(adapter.virtual_tokens for adapter in stack)
        if virtual_tokens >= self._base.max_model_len:
            message = f"{virtual_tokens} virtual tokens leave no room in the model's {self._base.max_model_len}"
            raise AdapterError("base_mismatch", message, "num_virtual_tokens")
        num_bytes, capacity = sum(adapter.bytes for adapter in stack), self._engine.bank.capacity
        num_bytes += shared_bytes(delta for adapter in stack for delta in adapter.deltas.values())
        if num_bytes > capacity:
            subject = "it takes" if len(stack) == 1 else "it and the task's adapter take"
            message = f"resident {subject} {num_bytes} bytes; the server's adapter memory is {capacity}"
            raise AdapterError("too_large", message)

    def _load_adapter(self, files: Mapping[str, str]) -> Adapter:
        """Read a stored adapter; on a loader's thread."""
        try:
            contents = {name: self._blobs.read(sha256) for name, sha256 in files.items()}
        except StoreUnavailable as error:
            raise RequestError("store_unavailable", str(error)) from error
        except (VersionCorrupt, OSError) as error:
            message = f"this version's content is damaged: {error}; uploading the same content again heals it"
            raise RequestError("version_corrupt", message) from error
        try:
            checkpoint = Checkpoint.parse(contents, self._base.dtype, self._engine.bank.capacity)
            return read_adapter(checkpoint, self._base.shape)
        except AdapterError as error:
            code = "adapter_too_large" if error.code == "too_large" else "adapter_unavailable"
            raise RequestError(code, f"the version no longer loads: {error.message}") from error


def _adapter_facts(adapter: Adapter) -> AdapterFacts:
    return AdapterFacts(
        method=adapter.method,
        parameters=adapter.parameters,
        bytes=adapter.bytes,
        virtual_tokens=adapter.virtual_tokens,
        rank=adapter.rank,
        warnings=list(adapter.warnings),
        tasks=adapter.tasks,
    )


def _limits(settings: Configure, base: FrozenBase) -> EngineLimits:
    page_bytes = KVCache.page_bytes(base.layers, settings.page_size, base.dtype)
    budget = settings.kv_cache_bytes or int(_free_memory(base.device) * _KV_SHARE)
    num_pages = budget // page_bytes
    if num_pages < 2:
        raise StartupError(f"--kv-cache-memory is too small: one page of {settings.page_size} tokens is {page_bytes} B")
    return EngineLimits(
        max_seqs=settings.max_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        max_prefill_tokens=settings.max_prefill_tokens or PREFILL_TOKENS[base.device.type],
        max_queue=settings.max_queue,
        num_pages=num_pages,
        page_size=settings.page_size,
        adapter_bytes=settings.adapter_bytes,
    )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available


def _facts(settings: Configure, base: FrozenBase, folder: Path, limits: EngineLimits) -> BaseFacts:
    tokenizer = _tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return BaseFacts(
        id=settings.base_id,
        fingerprint=fingerprint(folder, Path(settings.cache)),
        architecture=type(base.model).__name__,
        parameters=base.parameters,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        max_model_len=base.max_model_len,
        vocab_size=base.vocab_size,
        eos_token_ids=base.eos_token_ids,
        tokenizer=backend.to_str() if backend is not None else None,
        special_tokens={
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        if tokenizer is not None
        else {},
        chat_template=tokenizer.chat_template if tokenizer is not None else None,
        kv_pages=limits.num_pages - 1,
        page_size=limits.page_size,
        methods=[_method_entry(method.FACTS) for method in METHODS],
    )


def _method_entry(facts: MethodFacts) -> MethodEntry:
    return MethodEntry(
        name=facts.name,
        mechanism=facts.mechanism,
        formats=list(facts.formats),
        parameters=facts.parameters,
        cost=facts.cost,
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer; None where its folder has none, so that only token ids can be asked for."""
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").exists():
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise StartupError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    return tokenizer
