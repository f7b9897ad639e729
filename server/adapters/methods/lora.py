"""LoRA: trained low-rank updates of linear modules.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; rsLoRA's scaling: Kalajdzievski 2023;
DoRA: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024.
Checkpoint (PEFT `LORA`): per targeted module `lora_A.weight` `[rank, in]` and `lora_B.weight` `[out, rank]`:
y = Wx + b + s B A x with s = alpha / rank, or alpha / √rank with `use_rslora`. `rank_pattern` and `alpha_pattern`
give a module its own rank and alpha.

With `lora_bias` also `lora_B.bias` `[out]`, scaled as B is: y = Wx + b + s (B A x + β). With `use_dora` also
`lora_magnitude_vector` m `[out]`: y = c ⊙ (Wx + s B A x) + b, where c = m / ‖W + s B A‖, the norm of each row, computed
once, when the adapter is read. In a stack it adds its difference from the base, y - (Wx + b), to what is below it.
Biases of the base that were trained too (`bias`): see `biases`. Of the input embedding: `lora_embedding_A`
`[rank, vocabulary]` and `lora_embedding_B` `[width, rank]`, and rows of it (`trainable_token_indices`): see
`embeddings`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import in_turn, low_rank, output_scale, shift
from server.adapters.method import Adapter, MethodFacts
from server.adapters.methods.biases import take_biases
from server.adapters.methods.embeddings import embedding_low_rank, trained_tokens
from server.adapters.methods.ranks import RANK_KEYS, lora_scaling, module_rank
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, RowDelta, SiteKind

NAME = "lora"
PEFT_TYPE = "LORA"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: low rank",
    formats=("PEFT LORA", "AdapterHub lora, dora, vera, dvora"),
    parameters="r·(in + out) for each targeted module; out more with lora_bias, use_dora, or a trained bias",
    cost="two thin matrix products at each targeted module",
)

_USED = (
    *RANK_KEYS,
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "bias",
    "lora_bias",
    "use_dora",
    "trainable_token_indices",
)
_TRAINING_ONLY = (
    "lora_dropout",
    "fan_in_fan_out",  # how the base stores W
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",  # of use_qalora
    "runtime_config",
    "ensure_weight_tying",  # of modules_to_save
)
_UNSUPPORTED = (
    "modules_to_save",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
# Initialisations that leave the base's own weights as they are. The others move part of W into A and B, so
# that the adapter is right only over a base that was changed likewise.
_BASE_KEEPING_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_NORM_ROWS = 1024  # of a weight in float32 at a time


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=_UNSUPPORTED)
    _check_initialisation(checkpoint.config.get("init_lora_weights"))
    _check_variant(checkpoint)
    sites = targeted_sites(checkpoint, base, SiteKind.LINEAR, SiteKind.EMBEDDING)
    at_embedding = _at_embedding(checkpoint, base, sites)
    updates = {name: _update(checkpoint, base, name) for name in sites if name not in at_embedding}
    biases = take_biases(checkpoint, base, sites)
    checkpoint.close()
    deltas = {name: update.delta(biases.pop(name, None)) for name, update in updates.items()}
    deltas |= {name: shift(bias) for name, bias in biases.items()} | at_embedding
    return Adapter(
        method=NAME,
        deltas=deltas,
        parameters=checkpoint.parameters,
        rank=max(module_rank(checkpoint, name) for name in sites),
        warnings=tuple(checkpoint.warnings),
    )


@dataclass(frozen=True, eq=False)
class _Update:
    """What is trained at one module: y ← scale ⊙ (y + up downᵀ x) + constant."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank], with the scaling
    scale: Tensor | None = None  # [out]
    constant: Tensor | None = None  # [out]

    def delta(self, bias: Tensor | None) -> RowDelta:
        """With the change of the base's own bias `[out]`, if there is one."""
        parts = [low_rank(self.down, self.up.t())]
        if self.scale is not None:
            parts.append(output_scale(self.scale))
        constants = [constant for constant in (self.constant, bias) if constant is not None]
        if constants:
            parts.append(shift(torch.stack(constants).sum(0)))
        return in_turn(*parts, is_relative=self.scale is not None)


def _update(checkpoint: Checkpoint, base: BaseShape, name: str) -> _Update:
    """Take a module's tensors."""
    site, key = base.sites[name], f"{KEY_PREFIX}{name}"
    rank = module_rank(checkpoint, name)
    scaling = lora_scaling(checkpoint, name, rank)
    down = checkpoint.take(f"{key}.lora_A.weight", (rank, site.inputs))
    up = checkpoint.take(f"{key}.lora_B.weight", (site.outputs, rank))
    up = checkpoint.finite(f"{key}.lora_B.weight", up * scaling)
    if checkpoint.config.get("lora_bias"):
        constant = checkpoint.take(f"{key}.lora_B.bias", (site.outputs,))
        return _Update(down, up, constant=checkpoint.finite(f"{key}.lora_B.bias", constant * scaling))
    if checkpoint.config.get("use_dora"):
        magnitude = checkpoint.take(f"{key}.lora_magnitude_vector", (site.outputs,))
        scale = magnitude.float() / row_norms(base.weight(name), down, up)
        scale = checkpoint.finite(f"{key}.lora_magnitude_vector", scale.to(magnitude.dtype))
        bias = base.bias(name)
        return _Update(down, up, scale, None if bias is None else (1 - scale) * bias.to(scale.device))
    return _Update(down, up)


def row_norms(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """‖W + up down‖ of each row, `[out]`, in float32; some rows at a time, since W may be large."""
    down, up = (factor.to(weight.device, torch.float32) for factor in (down, up))
    parts = zip(torch.split(weight, _NORM_ROWS), torch.split(up, _NORM_ROWS), strict=True)
    return torch.cat([torch.addmm(rows.float(), factor, down).norm(dim=1) for rows, factor in parts]).cpu()


def _at_embedding(checkpoint: Checkpoint, base: BaseShape, targeted: Collection[str]) -> dict[str, RowDelta]:
    """What is trained of the input embedding, and of an output layer tied to it."""
    deltas = {
        name: embedding_low_rank(checkpoint, base) for name in targeted if base.sites[name].kind is SiteKind.EMBEDDING
    }
    key = "trainable_token_indices"
    if not checkpoint.config.get(key):
        return deltas
    tokens = trained_tokens(checkpoint, base, key, "token_adapter.trainable_tokens_delta")
    for name in tokens:
        if name in targeted:
            message = f"{key} and target_modules both change {name}; only one of them can"
            raise AdapterError("unsupported_method", message, key)
    return deltas | tokens


def _check_variant(checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("use_dora") and checkpoint.config.get("lora_bias"):
        raise AdapterError("unsupported_method", "lora_bias with use_dora is not possible in PEFT either", "lora_bias")


def _check_initialisation(value: Any) -> None:
    if value not in _BASE_KEEPING_INITS:
        raise AdapterError(
            "unsupported_method",
            f"init_lora_weights = {value!r} changes the base's weights; save the adapter converted to plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
            "init_lora_weights",
        )
