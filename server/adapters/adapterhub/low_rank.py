"""AdapterHub's `lora` architecture: LoRA, and (IA)³ as its library has it.

Hu et al. 2022 and Liu et al. 2022, see `lora` and `ia3`. Tensors, under `model.layers.<i>.<module>.loras.<name>.`:

    composition_mode "add"    LoRA   y + (alpha / r) BAx        lora_A [r, in], lora_B [out, r]
    composition_mode "scale"  (IA)³  alpha · l ⊙ y              lora_B [out, 1] = l

of q, k, v as `attn_matrices` says. `intermediate_lora` is Llama's down_proj (so that this (IA)³ scales its output,
where PEFT's scales its input) and `output_lora` its up_proj. Up to adapters 1.0 the library trained without alpha.
"""

from __future__ import annotations

from server.adapters.adapterhub.part import HubPart
from server.adapters.deltas import low_rank, output_scale
from server.adapters.method import Adapter
from server.adapters.methods import ia3, lora
from server.errors import AdapterError
from server.model import BaseShape, RowDelta

_USED = (
    "architecture",
    "composition_mode",
    "r",
    "alpha",
    "attn_matrices",
    "selfattn_lora",
    "intermediate_lora",
    "output_lora",
    "leave_out",
)
_TRAINING_ONLY = ("dropout", "init_weights", "init_weights_seed", "dtype")
_UNSUPPORTED = ("use_dora", "use_gating", "vera_b", "vera_d")
_ATTENTION = {letter: f"self_attn.{letter}_proj" for letter in "qkv"}
_ALPHA_SINCE = (1, 1)  # the version whose training first scaled by alpha


def read(part: HubPart, base: BaseShape) -> Adapter:
    """See the module."""
    checkpoint = part.checkpoint
    deltas, rank = take_deltas(part, base)
    checkpoint.close()
    return Adapter(
        method=ia3.NAME if rank is None else lora.NAME,
        deltas=deltas,
        parameters=checkpoint.parameters,
        rank=rank,
        warnings=tuple(checkpoint.warnings),
    )


def take_deltas(part: HubPart, base: BaseShape) -> tuple[dict[str, RowDelta], int | None]:
    """The deltas of a `lora` config, a file's only one or one of a union, and its rank; None for (IA)³."""
    checkpoint = part.checkpoint
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=_UNSUPPORTED)
    mode = checkpoint.config.get("composition_mode")
    if mode not in ("add", "scale"):
        message = f"composition_mode is {mode!r}; it must be 'add' (LoRA) or 'scale' ((IA)³)"
        raise AdapterError("bad_config", message, "composition_mode")
    rank = checkpoint.integer("r")
    if mode == "scale" and rank != 1:
        raise AdapterError("unsupported_method", f"r is {rank} with composition_mode 'scale'; it must be 1", "r")
    alpha = checkpoint.number("alpha", checkpoint.config.get("alpha")) if part.version >= _ALPHA_SINCE else float(rank)
    deltas: dict[str, RowDelta] = {}
    modules = _modules(part)
    for layer in part.layers(base):
        for module in modules:
            site = f"model.layers.{layer}.{module}"
            if site not in base.sites:
                raise AdapterError("base_mismatch", f"this base has no module {site}, which the adapter changes", site)
            deltas[site] = _delta(part, base, site, rank, alpha, is_scale=mode == "scale")
    return deltas, None if mode == "scale" else rank


def _delta(part: HubPart, base: BaseShape, site: str, rank: int, alpha: float, *, is_scale: bool) -> RowDelta:
    """Take a module's tensors."""
    checkpoint, key, shape = part.checkpoint, f"{site}.loras.{part.name}", base.sites[site]
    up = checkpoint.take(f"{key}.lora_B", (shape.outputs, rank))
    if is_scale:
        return output_scale(checkpoint.finite(f"{key}.lora_B", up.flatten() * alpha))
    down = checkpoint.take(f"{key}.lora_A", (rank, shape.inputs))
    return low_rank(down, checkpoint.finite(f"{key}.lora_B", up * (alpha / rank)).t())


def _modules(part: HubPart) -> list[str]:
    """The modules of a layer that the config names."""
    config = part.checkpoint.config
    matrices = config.get("attn_matrices") or []
    if not isinstance(matrices, list) or not all(letter in _ATTENTION for letter in matrices):
        message = f"attn_matrices is {matrices!r}; it must be a list of {', '.join(_ATTENTION)}"
        raise AdapterError("bad_config", message, "attn_matrices")
    modules = [_ATTENTION[letter] for letter in matrices] if config.get("selfattn_lora") else []
    modules += ["mlp.down_proj"] if config.get("intermediate_lora") else []
    modules += ["mlp.up_proj"] if config.get("output_lora") else []
    if not modules:
        message = "none of selfattn_lora, intermediate_lora, output_lora is set: the adapter changes nothing"
        raise AdapterError("bad_config", message, "attn_matrices")
    return modules
