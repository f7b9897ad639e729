"""A customization as bytes. A million of them must fit, so hashes are raw, common file names and words are numbers, and
what can be derived (the digest) is left out. No reading or writing here.

    4 bytes   the version it was made against, 0: none   ┐
    2 bytes   the number of the base's fingerprint       │ written by put_customization.lua: unsigned integers and a
    2 bytes   the number of the method                   │ float, little-endian; the key `words` has the numbers
    8 bytes   the time it was put, Unix seconds          │
    4 bytes   the number of who pays, 0: nobody          │ of the API key, in the key `payers`
    8 bytes   the bytes that are paid for                ┘
    the rest  MessagePack of `_Packed`, an array
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import msgspec

from adapters_store.identity import adapter_digest
from adapters_store.records import Customization, FileRecord, NewCustomization

#: File names by their number. Stored data depends on the order: append only. Any other name is stored as it is.
FILE_NAMES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter.safetensors",
    "head_config.json",
    "model_head.safetensors",
    "medley.json",
    "README.md",
)
_HEADER = struct.Struct("<IHHdIQ")


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    is_replace: bool
    parameters: int
    size: int  # `bytes` of the record; that name is the type's here
    virtual_tokens: int
    rank: int | None
    files: list[Any]
    """Of each file its number or name, the hash as bytes, the size."""


def pack(new: NewCustomization) -> bytes:
    """All but what the header says. `new.digest` must be `adapter_digest(new.files)`."""
    files: list[Any] = []
    for name, record in new.files.items():
        files += [FILE_NAMES.index(name) if name in FILE_NAMES else name, bytes.fromhex(record.sha256), record.size]
    packed = _Packed(
        is_replace=new.mode == "replace",
        parameters=new.parameters,
        size=new.bytes,
        virtual_tokens=new.virtual_tokens,
        rank=new.rank,
        files=files,
    )
    return msgspec.msgpack.encode(packed)


def unpack(user: str, task: str, stored: bytes, words: Mapping[int, str]) -> Customization:
    """What the header and `pack` say; `words` has at least the header's numbers."""
    version, fingerprint, method, created, _, _ = _HEADER.unpack_from(stored)
    packed = msgspec.msgpack.decode(memoryview(stored)[_HEADER.size :], type=_Packed)
    names, hashes, sizes = packed.files[::3], packed.files[1::3], packed.files[2::3]
    files = {
        FILE_NAMES[name] if isinstance(name, int) else str(name): FileRecord(sha256.hex(), int(size))
        for name, sha256, size in zip(names, hashes, sizes, strict=True)
    }
    return Customization(
        user=user,
        task=task,
        mode="replace" if packed.is_replace else "compose",
        made_against=version or None,
        created=created,
        digest=adapter_digest(files),
        method=words[method],
        parameters=packed.parameters,
        bytes=packed.size,
        virtual_tokens=packed.virtual_tokens,
        rank=packed.rank,
        files=files,
        base_fingerprint=words[fingerprint],
    )


def blobs_of(stored: bytes) -> list[str]:
    """The hashes of the files alone: garbage collection reads every customization."""
    packed = msgspec.msgpack.decode(memoryview(stored)[_HEADER.size :], type=_Packed)
    return [sha256.hex() for sha256 in packed.files[1::3]]


def paid_by(stored: bytes) -> tuple[int, int]:
    """The number of the API key that pays for it, 0 where none does, and for how many bytes."""
    *_, payer, size = _HEADER.unpack_from(stored)
    return payer, size
