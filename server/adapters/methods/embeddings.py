"""Changes of the input embedding: low-rank ones, and rows of it that were trained (PEFT's trainable tokens).

Low rank: h ← h + s B A[:, id]. A lies in the pool with one row for each id, and a token reads no row but its own.
Trained rows replace the base's; they are kept as differences from them: h ← h + Δ[id] and, where the output layer's
weight is the embedding's, y[id] ← y[id] + Δ[id] · x there too, as in PEFT. Both act on the tokens of a text,
a text prompt's in the same stack too. A soft prompt's virtual tokens keep the embeddings that they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.methods.ranks import lora_scaling, module_rank
from server.adapters.targets import KEY_PREFIX, names_module
from server.errors import AdapterError
from server.model import BaseShape, DeltaKind, RowDelta, SiteKind, TokenEmbedding

_DIGIT = 256  # whole numbers up to it are exact in every dtype of a base
_DIGITS = 3
_COPY_PREFIXES = (KEY_PREFIX, "base_model.")  # of layer methods; of prompts, which wrap the base only once
_TARGETED = ".base_layer"  # what PEFT puts in a targeted module's place holds it under this name


@dataclass(frozen=True)
class _LookedUpLowRank(DeltaKind):
    """y ← y + B a, where a is the token's own column of A."""

    looks_up = True

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        columns, up = blocks  # [groups, tokens, rank], [groups, rank, out]
        outputs.baddbmm_(columns, up)


@dataclass(frozen=True)
class _TokenRows(DeltaKind):
    """y ← y + Δ[id], for the ids that have a row."""

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        digits, rows = blocks  # [groups, ids, digits], [groups, ids, out]
        outputs.baddbmm_((inputs == _token_ids(digits)[:, None]).to(rows.dtype), rows)


@dataclass(frozen=True)
class _TokenLogits(DeltaKind):
    """y[id] ← y[id] + Δ[id] · x, for the ids that have a row."""

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        digits, rows = blocks  # [groups, ids, digits], [groups, ids, in]
        change = inputs @ rows.transpose(1, 2)
        outputs.scatter_add_(2, _token_ids(digits)[:, None].expand_as(change), change)


def embedding_low_rank(checkpoint: Checkpoint, base: BaseShape) -> RowDelta:
    """Take the tensors of LoRA's update of the input embedding."""
    embedding = _embedding(base, "target_modules")
    for key in ("use_dora", "lora_bias", "ensure_weight_tying"):
        if checkpoint.config.get(key):
            message = f"{key} is not supported where target_modules names the input embedding"
            raise AdapterError("unsupported_method", message, key)
    name, key = embedding.site, f"{KEY_PREFIX}{embedding.site}.lora_embedding"
    rank = module_rank(checkpoint, name)
    scaling = lora_scaling(checkpoint, name, rank) * embedding.scale
    columns = checkpoint.take(f"{key}_A", (rank, base.vocab_size)).t()
    up = checkpoint.take(f"{key}_B", (base.embedding_width, rank)).t()
    return RowDelta(_LookedUpLowRank(), (columns, checkpoint.finite(f"{key}_B", up * scaling)))


def trained_tokens(checkpoint: Checkpoint, base: BaseShape, config_key: str, tensor: str) -> dict[str, RowDelta]:
    """Take the trained rows of the input embedding: the deltas there and, if it is tied, at the output layer.

    `config_key` names the ids, a list or `{module: list}` with the embedding as the only module; `tensor` follows the
    module's name in the tensors' keys.
    """
    embedding = _embedding(base, config_key)
    ids = _checked_ids(checkpoint.config.get(config_key), base, embedding, config_key)
    key = f"{KEY_PREFIX}{embedding.site}.{tensor}"
    rows = checkpoint.take(key, (len(ids), base.embedding_width))
    index = torch.tensor(ids)
    at_input = checkpoint.finite(key, rows * embedding.scale - base.embed(index))
    digits = torch.stack([index // _DIGIT**place % _DIGIT for place in range(_DIGITS)], 1).to(rows.dtype)
    deltas = {embedding.site: RowDelta(_TokenRows(), (digits, at_input))}
    head = embedding.tied_head
    if head is not None:
        _take_equal(checkpoint, f"{KEY_PREFIX}{head}.{tensor}", rows)
        if base.bias(head) is not None:
            message = "trained tokens are not supported over a tied output layer that has a bias"
            raise AdapterError("unsupported_method", message, config_key)
        change = rows - base.weight(embedding.site)[index.to(base.weight(embedding.site).device)].cpu()
        deltas[head] = RowDelta(_TokenLogits(), (digits, checkpoint.finite(key, change)))
    return deltas


def take_base_copies(checkpoint: Checkpoint, base: BaseShape) -> None:
    """PEFT adds the base's own embedding and output layer to the file of an adapter that targets one, whatever its
    method, and to any file with `save_embedding_layers`. Take those that are the base's indeed.

    Raises `unsupported_method` for a targeted one with other values: the rest was trained over it. What is not targeted
    and differs was trained itself; the method that has no use for it refuses it.
    """
    endings = (".weight", ".bias") if checkpoint.config.get("bias") in (None, "none") else (".weight",)
    for name in checkpoint.names:
        if not name.endswith(endings):
            continue
        module, _, kind = name.rpartition(".")
        sites = [module.removesuffix(_TARGETED).removeprefix(prefix) for prefix in _COPY_PREFIXES]
        site = next((site for site in sites if _is_vocabulary(base, site)), None)
        own = None if site is None else (base.weight if kind == "weight" else base.bias)(site)
        is_copy = own is not None and checkpoint.take_copy(name, own.cpu())
        if module.endswith(_TARGETED) and kind == "weight" and not is_copy:
            message = f"tensor {name} is not what this base has there; save the adapter over this base"
            raise AdapterError("unsupported_method", message, name)


def _is_vocabulary(base: BaseShape, site: str) -> bool:
    """Whether it is the input embedding or the output layer."""
    found = base.sites.get(site)
    return found is not None and (found.kind is SiteKind.EMBEDDING or found.is_head)


def _token_ids(digits: Tensor) -> Tensor:
    """`[groups, ids, digits]` → `[groups, ids]`. A row of zeros is id 0; what is added there is zero as well."""
    places = digits.long()
    return sum((places[..., place] * _DIGIT**place for place in range(1, _DIGITS)), places[..., 0])


def _embedding(base: BaseShape, key: str) -> TokenEmbedding:
    if base.token_embedding is None:
        raise AdapterError("unsupported_method", f"{key}: this base's input embedding cannot be changed", key)
    return base.token_embedding


def _checked_ids(given: Any, base: BaseShape, embedding: TokenEmbedding, key: str) -> list[int]:
    if isinstance(given, dict):
        if len(given) != 1 or not names_module(list(given), embedding.site, key):
            message = f"{key} names {', '.join(given)}; only the input embedding's rows are served, {embedding.site}"
            raise AdapterError("unsupported_method", message, key)
        given = next(iter(given.values()))
    if not isinstance(given, list) or not given or not all(type(token) is int for token in given):
        raise AdapterError("bad_config", f"{key} must list token ids, whole numbers", key)
    if len(set(given)) < len(given):
        raise AdapterError("bad_config", f"{key} names an id twice", key)
    foreign = next((token for token in given if not 0 <= token < base.vocab_size), None)
    if foreign is not None:
        message = f"token {foreign} is not in this base's vocabulary of {base.vocab_size}"
        raise AdapterError("base_mismatch", message, key)
    return given


def _take_equal(checkpoint: Checkpoint, name: str, rows: Tensor) -> None:
    """Take the copy of the rows that PEFT may save for a tied output layer."""
    if name in checkpoint.names and not torch.equal(checkpoint.take(name, tuple(rows.shape)), rows):
        message = f"tensor {name} differs from the embedding's, which this base's output layer shares"
        raise AdapterError("base_mismatch", message, name)
