"""Which compiled kernels this machine has; where it has none, torch's operations do the same."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from server.model.decode_kernel import DecodeKernel
    from server.model.delta_kernels import DeltaKernels
    from server.model.layer_kernels import LayerKernels


logger = logging.getLogger("medley.kernels")


class Kernels(NamedTuple):
    """All of them."""

    decode: DecodeKernel
    deltas: DeltaKernels
    layers: LayerKernels


def find_kernels(device: torch.device, dtype: torch.dtype) -> tuple[Kernels | None, str]:
    """The kernels, or None, and in words which or why not."""
    if device.type != "cpu" or dtype != torch.float32:
        return None, f"no kernels for {dtype} on {device.type}"
    try:
        # only where they are used: what is imported here is compiled, at the first start
        from server.model.decode_kernel import DecodeKernel  # noqa: PLC0415
        from server.model.delta_kernels import DeltaKernels  # noqa: PLC0415
        from server.model.layer_kernels import LayerKernels  # noqa: PLC0415

        return Kernels(DecodeKernel(), DeltaKernels(), LayerKernels()), "by compiled kernels"
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: no folder for what numba compiles
        logger.warning("steps run without compiled kernels, more slowly: %s", error)
        return None, "the kernels cannot be had"
