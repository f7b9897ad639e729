"""C³A: updates made of circulant blocks.

Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", Findings of ACL 2025. Checkpoint (PEFT `C3A`):
per targeted module `c3a_kernel` w `[out / b, in / b, b]`, b the `block_size`. With x in n = in / b parts and y in
out / b parts of b values,

    yₘ ← yₘ + 1/in Σₙ F⁻¹(F(xₙ) ⊙ conj F(wₘₙ))      F the discrete Fourier transform

The conjugate, divided by in, is kept: its real and its imaginary parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.targets import KEY_PREFIX, pattern_value, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, DeltaKind, RowDelta, SiteShape

NAME = "c3a"
PEFT_TYPE = "C3A"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: circular convolution",
    formats=("PEFT C3A",),
    parameters="in·out/b for each targeted module, b the block_size; resident about the same",
    cost="Fourier transforms of each targeted module's input and update, in·out/b multiplications",
)
_USED = (
    "block_size",
    "block_size_pattern",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
)


@dataclass(frozen=True)
class _Circulant(DeltaKind):
    block: int

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        parts = inputs.float().reshape(*inputs.shape[:2], -1, self.block)  # [groups, tokens, n, b]
        shape = (len(inputs), -1, parts.shape[2], self.block // 2 + 1)
        kernel = torch.complex(*(block.float().view(shape) for block in blocks))  # [groups, m, n, b // 2 + 1]
        convolved = torch.einsum("gtnf,gmnf->gtmf", torch.fft.rfft(parts), kernel)
        outputs.add_(torch.fft.irfft(convolved, n=self.block).flatten(2).to(outputs.dtype))


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=("init_weights",), unsupported=("bias", "modules_to_save"))
    checkpoint.integer("block_size")
    patterns = checkpoint.config.get("block_size_pattern") or {}
    if not isinstance(patterns, dict):
        message = f"block_size_pattern is {patterns!r}; it must map names to block sizes"
        raise AdapterError("bad_config", message, "block_size_pattern")
    deltas = {name: _delta(checkpoint, name, base.sites[name], patterns) for name in targeted_sites(checkpoint, base)}
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _delta(checkpoint: Checkpoint, name: str, site: SiteShape, patterns: dict[str, object]) -> RowDelta:
    size = pattern_value(patterns, name, "block_size_pattern", checkpoint.config["block_size"])
    if type(size) is not int or size < 1 or site.inputs % size or site.outputs % size:
        message = (
            f"block_size is {size!r}; it must divide the {site.inputs} inputs and {site.outputs} outputs of {name}"
        )
        raise AdapterError("base_mismatch", message, "block_size")
    key = f"{KEY_PREFIX}{name}.c3a_kernel"
    kernel = checkpoint.take(key, (site.outputs // size, site.inputs // size, size))
    kept = torch.fft.rfft(kernel.double()).conj() / site.inputs
    rows = (part.to(kernel.dtype).flatten(0, 1) for part in (kept.real, kept.imag))  # [out / b · in / b, b // 2 + 1]
    return RowDelta(_Circulant(size), tuple(checkpoint.finite(key, row) for row in rows))
