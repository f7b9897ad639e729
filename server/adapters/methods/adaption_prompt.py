"""LLaMA-Adapter: a trained prompt of its own in each of the top layers, attended to beside the text and gated.

Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Large Language Models with Zero-initialized Attention", ICLR
2024. Checkpoint (PEFT `ADAPTION_PROMPT`): for each of the last `adapter_layers` layers `adaption_prompt` P
`[1, adapter_len, hidden]` and `adaption_gate` g `[1]`. With k = W_k P and v = W_v P by the layer's own projections,
computed when the adapter is read, and q the queries after rotation, g softmax(q kᵀ / √head_dim) v is added to what goes
into the output projection. PEFT runs that projection a second time for the addition, its bias too. On GPT-2, whose
c_attn makes queries, keys and values at once, it adds the same to what comes out of the output projection. In a stack q
are the step's own queries, with the changes of all its adapters; k and v stay those of the base's projections.

Where the base's attention has other projections than these or q_proj, k_proj, v_proj and o_proj, or norms queries, PEFT
does something else or nothing, and the adapter is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import shift
from server.adapters.method import Adapter, MethodFacts
from server.adapters.targets import KEY_PREFIX
from server.errors import AdapterError
from server.model import BaseShape, DeltaKind, LayerShape, RowDelta, SiteKind

NAME = "adaption_prompt"
PEFT_TYPE = "ADAPTION_PROMPT"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: attention",
    formats=("PEFT ADAPTION_PROMPT",),
    parameters="adapter_len·h + 1 for each of the top layers; resident: twice adapter_len rows of the keys' width",
    cost="a second, short attention in each of the top layers",
)

_JOINT = "c_attn"  # GPT-2's
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class ExtraAttention(DeltaKind):
    """`inputs` are queries, `outputs` what goes to the output projection, or on GPT-2 what comes out of it; both
    `[groups, tokens, heads · head_dim]`."""

    shape: LayerShape

    def change_output(self, inputs: Tensor, outputs: Tensor, *blocks: Tensor) -> None:
        groups, tokens, _ = inputs.shape
        kv_heads, head_dim = self.shape
        keys, values = (  # [groups, kv_heads, adapter_len, head_dim]; the gate is in the values
            block.view(groups, -1, kv_heads, head_dim).transpose(1, 2) for block in blocks
        )
        # query heads that share a KV head stand as that head's tokens
        grouped = inputs.reshape(groups, tokens, kv_heads, -1, head_dim).transpose(1, 2).flatten(2, 3)
        weights = ((grouped @ keys.transpose(2, 3)).float() * head_dim**-0.5).softmax(-1).to(inputs.dtype)
        added = (weights @ values).view(groups, kv_heads, tokens, -1, head_dim).transpose(1, 2)
        outputs.add_(added.reshape(outputs.shape))


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(
        used=("target_modules", "adapter_len", "adapter_layers"), training_only=(), unsupported=("modules_to_save",)
    )
    length, count = checkpoint.integer("adapter_len"), checkpoint.integer("adapter_layers")
    ending = checkpoint.config.get("target_modules")
    if not isinstance(ending, str):
        raise AdapterError("bad_config", f"target_modules is {ending!r}; it must be a name's ending", "target_modules")
    attentions = [name for name, site in base.sites.items() if site.kind is SiteKind.ATTENTION]
    chosen = [(name, shape) for name, shape in zip(attentions, base.layers, strict=True) if name.endswith(ending)]
    if count > len(chosen):
        message = f"adapter_layers is {count}; this base has {len(chosen)} layers with an attention called {ending}"
        raise AdapterError("base_mismatch", message, "adapter_layers")
    deltas: dict[str, RowDelta] = {}
    for name, shape in chosen[-count:]:
        site = _site(base, name, shape)
        deltas[site] = _delta(checkpoint, base, name, shape, length)
        output_bias = base.bias(f"{name}.o_proj") if site == name else None
        if output_bias is not None:
            deltas[f"{name}.o_proj"] = shift(output_bias.cpu())
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _site(base: BaseShape, name: str, shape: LayerShape) -> str:
    """Where PEFT adds in the layer whose attention is called `name`: before its output projection, or behind it."""
    width, heads_width = base.embedding_width, shape.kv_heads * shape.head_dim
    if f"{name}.{_JOINT}" in base.sites:
        block = next((each for each in base.blocks if each.is_attention and name.startswith(f"{each.layer}.")), None)
        if block and base.sites[f"{name}.{_JOINT}"].outputs == 3 * width and heads_width == width:
            return block.result_site
        message = f"{name} has a {_JOINT} and is not like GPT-2's, so this method cannot be served on this base"
        raise AdapterError("base_mismatch", message, "target_modules")
    normed = [other for other, site in base.sites.items() if site.norm is not None and other.startswith(f"{name}.")]
    if normed or not all(f"{name}.{projection}" in base.sites for projection in _PROJECTIONS):
        message = f"{name} is not made of {', '.join(_PROJECTIONS)} alone, so this method cannot be served on this base"
        raise AdapterError("base_mismatch", message, "target_modules")
    if base.sites[name].inputs != width or width % heads_width:
        message = f"{name}'s heads together are {base.sites[name].inputs} wide; PEFT takes them for {width}"
        raise AdapterError("base_mismatch", message, "target_modules")
    return name


def _delta(checkpoint: Checkpoint, base: BaseShape, name: str, shape: LayerShape, length: int) -> RowDelta:
    key = f"{KEY_PREFIX}{name}.adaption_"
    prompt = checkpoint.take(f"{key}prompt", (1, length, base.embedding_width))[0]
    gate = checkpoint.take(f"{key}gate", (1,))
    if f"{name}.{_JOINT}" in base.sites:
        _, keys, values = _projected(base, f"{name}.{_JOINT}", prompt).chunk(3, dim=1)
    else:
        keys, values = (_projected(base, f"{name}.{part}", prompt) for part in ("k_proj", "v_proj"))
    blocks = (keys.to(prompt.dtype), (gate.float() * values).to(prompt.dtype))
    for block in blocks:
        checkpoint.finite(f"{key}prompt", block)
    return RowDelta(ExtraAttention(shape), blocks)


def _projected(base: BaseShape, site: str, prompt: Tensor) -> Tensor:
    """`prompt` through a linear module of the base, in float32."""
    weight, bias = base.weight(site), base.bias(site)
    device = weight.device
    projected = functional.linear(prompt.to(device).float(), weight.float(), None if bias is None else bias.float())
    return projected.to(torch.device("cpu"))
