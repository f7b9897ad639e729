"""The table of methods. A new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from server.adapters.adapterhub import bottleneck, fusion, union
from server.adapters.adapterhub import dispatch as adapterhub
from server.adapters.checkpoint import HUB_KEY, PEFT_KEY, Checkpoint
from server.adapters.heads import take_peft_head
from server.adapters.method import Adapter, Method, OwnMethod, PeftMethod, Reader
from server.adapters.methods import (
    adalora,
    adaption_prompt,
    beft,
    c3a,
    cartridge,
    cpt,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    multitask_prompt,
    named_deltas,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    road,
    shira,
    sparse,
    text_prompt,
    top_layers,
    trainable_tokens,
    vera,
)
from server.adapters.methods.embeddings import take_base_copies
from server.errors import AdapterError
from server.model import BaseShape

METHODS: tuple[Method, ...] = (
    text_prompt,
    prompt_tuning,
    p_tuning,
    multitask_prompt,
    cpt,
    prefix_tuning,
    cartridge,
    ia3,
    lora,
    adalora,
    vera,
    loha,
    lokr,
    miss,
    hra,
    c3a,
    road,
    shira,
    beft,
    trainable_tokens,
    ln_tuning,
    adaption_prompt,
    bottleneck,
    fusion,
    union,
    named_deltas,
    sparse,
    top_layers,
)

_BY_PEFT_TYPE = {method.PEFT_TYPE: method for method in METHODS if isinstance(method, PeftMethod)}
_OWN = {method.MEDLEY_METHOD: method for method in METHODS if isinstance(method, OwnMethod)}

_AS_LORA = "one that changes weights can be made a LoRA: `medley convert PATH --to-lora RANK --model BASE`"


def read_adapter(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """The adapter of a checkpoint, by its format and the method that its config names."""
    key = checkpoint.format_key
    if key == HUB_KEY:
        return adapterhub.read(checkpoint, base)
    table: Mapping[str, Reader] = _BY_PEFT_TYPE if key == PEFT_KEY else _OWN
    named = checkpoint.config[key]
    if named not in table:
        way_out = f"; {_AS_LORA}" if key == PEFT_KEY else ""
        raise AdapterError(
            "unsupported_method", f"{key} {named} is not served here; {', '.join(table)} are{way_out}", key
        )
    if key != PEFT_KEY:
        return table[named].read(checkpoint, base)
    take_base_copies(checkpoint, base)
    head, rest = take_peft_head(checkpoint, base)
    return replace(table[named].read(rest, base), head=head)
