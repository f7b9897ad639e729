"""Which compiled kernels this machine has; where it has none, torch's operations do the same."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch

from server.model.device_deltas import find_device_deltas
from server.model.grouped_products import ALIGNED
from server.model.row_deltas import DeltaBackend, DeltaKind, Kernel
from server.model.sites import SiteKind

if TYPE_CHECKING:
    from server.model.base import BaseShape
    from server.model.decode_kernel import DecodeKernel
    from server.model.layer_kernels import LayerKernels
    from server.model.programs import Programs


logger = logging.getLogger("medley.kernels")


class Kernels(NamedTuple):
    """All of them."""

    deltas: DeltaBackend
    decode: DecodeKernel | None = None  # this and what follows on a CPU alone
    layers: LayerKernels | None = None
    programs: Programs | None = None


def find_kernels(device: torch.device, dtype: torch.dtype) -> tuple[Kernels | None, str]:
    """The kernels, or None, and in words which or why not."""
    if device.type == "cuda":
        deltas, note = find_device_deltas(device, dtype)
        logger.info("row deltas %s: %s", "out of copied rows" if deltas is None else "in place", note)
        return (None if deltas is None else Kernels(deltas)), note
    if device.type != "cpu" or dtype != torch.float32:
        return None, f"no kernels for {dtype} on {device.type}"
    try:
        # only where they are used: what is imported here is compiled, at the first start
        from server.model.decode_kernel import DecodeKernel  # noqa: PLC0415
        from server.model.delta_kernels import DeltaKernels  # noqa: PLC0415
        from server.model.layer_kernels import LayerKernels  # noqa: PLC0415
        from server.model.programs import Programs  # noqa: PLC0415

        return Kernels(DeltaKernels(), DecodeKernel(), LayerKernels(), Programs()), "by compiled kernels"
    except (ImportError, OSError) as error:  # no numba; not GNU OpenMP
        logger.warning("steps run without compiled kernels, more slowly: %s", error)
        return None, "the kernels cannot be had"


def kernel_at(shape: BaseShape, kernels: DeltaBackend | None, site: str, kind: DeltaKind) -> Kernel | None:
    """What computes a kind at a site in its place, if anything does: linear modules alone have such kernels."""
    return kernels.of(kind) if kernels is not None and shape.sites[site].kind is SiteKind.LINEAR else None


def run_kernel_at(shape: BaseShape, kernels: DeltaBackend | None, site: str, kind: DeltaKind) -> Kernel | None:
    """What computes a kind at a site for runs of many tokens, if anything does."""
    at = shape.sites[site]
    fits = at.kind is SiteKind.LINEAR and at.inputs % ALIGNED == at.outputs % ALIGNED == 0
    return kernels.of_runs(kind) if kernels is not None and fits else None
