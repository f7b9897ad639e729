"""AdapterHub's `prefix_tuning` architecture: prefix tuning whose text starts at position 0.

Li and Liang 2021, see `prefix_tuning`. Under `model.prefix_tuning.prefix_tunings.<name>.self_prefix.`, with W for the
2 · kv_heads · head_dim · layers values of a token:

    flat          control_trans [T·W], the keys and values themselves
    else          wte.weight [T, hidden] through control_trans.0 [bottleneck_size, hidden], `non_linearity` and
                  control_trans.2 [W, bottleneck_size], computed here once

A layer's keys stand before its values. The library repeats these tensors under every layer. Unlike PEFT's, the virtual
tokens take no positions: they are seen by all tokens, and the first token of the text has position 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from server.adapters.adapterhub.bottleneck_kind import ACTIVATIONS
from server.adapters.adapterhub.part import HubPart
from server.adapters.method import Adapter, KeyValuePrefix
from server.adapters.methods import prefix_tuning
from server.adapters.methods.prefix_tuning import key_value_width, layer_entries
from server.errors import AdapterError
from server.model import BaseShape

_USED = ("architecture", "flat", "prefix_length", "bottleneck_size", "non_linearity", "leave_out")
_TRAINING_ONLY = (
    "dropout",
    "init_weights_seed",
    "shared_gating",  # of use_gating
    "cross_prefix",  # of encoder-decoders, as the next
    "encoder_prefix",
)
_UNSUPPORTED = ("use_gating", "leave_out")  # without its prefix a layer would have to hide others' virtual tokens


def read(part: HubPart, base: BaseShape) -> Adapter:
    """See the module."""
    checkpoint = part.checkpoint
    prefix, repeated = take_prefix(part, base)
    checkpoint.close()
    return Adapter(
        method=prefix_tuning.NAME,
        prefix=prefix,
        parameters=checkpoint.parameters - repeated,
        warnings=tuple(checkpoint.warnings),
    )


def take_prefix(part: HubPart, base: BaseShape) -> tuple[KeyValuePrefix, int]:
    """The prefix of a config, a file's only one or one of a union, and how many values are repetitions of others."""
    checkpoint = part.checkpoint
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=_UNSUPPORTED)
    length = checkpoint.integer("prefix_length")
    width = key_value_width(base)
    own = f"model.prefix_tuning.prefix_tunings.{part.name}.self_prefix."
    total = len(base.layers) * 2 * width
    tensors, repeated = _take_all(part, base, own, _shapes(part, base, length, total))
    if checkpoint.config.get("flat"):
        flat = tensors["control_trans"]
    else:
        checkpoint.expand("prefix_length", length * total)
        flat = checkpoint.finite(f"{own}control_trans.2.weight", _project(part, tensors).to(base.dtype))
    return KeyValuePrefix(length, layer_entries(flat, length, width), takes_positions=False), repeated


def _project(part: HubPart, tensors: dict[str, Tensor]) -> Tensor:
    """Keys and values `[T, W]` in float32, out of the network."""
    name = part.checkpoint.config.get("non_linearity")
    function = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if function is None:
        message = f"non_linearity is {name!r}; {', '.join(sorted(ACTIVATIONS))} are known"
        raise AdapterError("unsupported_method", message, "non_linearity")
    own = {key: tensor.float() for key, tensor in tensors.items()}
    inner = function(linear(own["wte.weight"], own["control_trans.0.weight"], own["control_trans.0.bias"]))
    return linear(inner, own["control_trans.2.weight"], own["control_trans.2.bias"])


def _shapes(part: HubPart, base: BaseShape, length: int, total: int) -> dict[str, tuple[int, ...]]:
    """The prefix's tensors."""
    if part.checkpoint.config.get("flat"):
        return {"control_trans": (length * total,)}
    width = part.checkpoint.integer("bottleneck_size")
    return {
        "wte.weight": (length, base.embedding_width),
        "control_trans.0.weight": (width, base.embedding_width),
        "control_trans.0.bias": (width,),
        "control_trans.2.weight": (total, width),
        "control_trans.2.bias": (total,),
    }


def _take_all(
    part: HubPart, base: BaseShape, own: str, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], int]:
    """Take the tensors and their repetitions, which must be equal. Also says how many values were repeated."""
    checkpoint = part.checkpoint
    tensors = {key: checkpoint.take(own + key, shape) for key, shape in shapes.items()}
    repeated = 0
    for layer in range(len(base.layers)):
        pool = f"model.layers.{layer}.self_attn.prefix_tuning.pool.prefix_tunings.{part.name}.self_prefix."
        for key, shape in shapes.items():
            name = pool + key
            if name not in checkpoint.names:
                continue
            if not torch.equal(checkpoint.take(name, shape), tensors[key]):
                message = f"tensor {name} differs from {own + key}; in one file they are the same tensor"
                raise AdapterError("base_mismatch", message, name)
            repeated += tensors[key].numel()
    return tensors, repeated
