"""Matrices that many adapters have in common: on the device once, whoever uses them.

They are found by their content and live as long as somebody's delta refers to them. They lie beside the pool, not in
it, since they belong to no adapter; the bank counts them like everything else, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from server.model import DeltaKind, RowDelta


@dataclass(frozen=True, eq=False)
class SharedMatrices:
    """Equal ones are one object."""

    matrices: tuple[Tensor, ...]  # on the device; never to be written to

    @property
    def bytes(self) -> int:
        """On the device."""
        return sum(matrix.nbytes for matrix in self.matrices)


class SharingKind(DeltaKind):
    """A kind with matrices that are not an adapter's own; two are equal only if these are."""

    shared: SharedMatrices


def shared_bytes(deltas: Iterable[RowDelta]) -> int:
    """What these deltas have in common with other adapters', on the device; each once."""
    return sum(
        shared.bytes for shared in {delta.kind.shared for delta in deltas if isinstance(delta.kind, SharingKind)}
    )


_alive: WeakValueDictionary[str, SharedMatrices] = WeakValueDictionary()
_lock = Lock()  # adapters are read on several threads


def shared_matrices(*matrices: Tensor, device: torch.device) -> SharedMatrices:
    """What is on the device already, if anything of the same content is; else a copy of `matrices`."""
    content = hashlib.sha256(str(device).encode())
    for matrix in matrices:
        content.update(f"{matrix.dtype}{tuple(matrix.shape)}".encode())
        content.update(matrix.contiguous().view(torch.uint8).numpy().tobytes())
    key = content.hexdigest()
    with _lock:
        shared = _alive.get(key)
        if shared is None:
            shared = _alive[key] = SharedMatrices(tuple(matrix.contiguous().to(device) for matrix in matrices))
            if device.type == "cuda":  # steps on other streams read them
                torch.cuda.current_stream(device).synchronize()
        return shared
