"""AdapterHub's `lora` architecture: LoRA, and (IA)³ as its library has it.

Its LoRA may be a DoRA, a VeRA or both. Hu et al. 2022, Liu et al. 2022 and 2024, Kopiczko et al. 2024, see `lora`,
`ia3`, `vera`. Tensors, under `model.layers.<i>.<module>.loras.<name>.`:

    composition_mode "add"    LoRA   y + (alpha / r) BAx        lora_A [r, in], lora_B [out, r]
    composition_mode "scale"  (IA)³  alpha · l ⊙ y              lora_B [out, 1] = l

of q, k, v as `attn_matrices` says. `intermediate_lora` is Llama's down_proj (so that this (IA)³ scales its output,
where PEFT's scales its input) and `output_lora` its up_proj. Up to adapters 1.0 the library trained without alpha.

`use_dora`, of LoRA and VeRA: with `m.weight` m `[out, 1]`, m / ‖W + BA‖ ⊙ (y + (alpha / r) BAx), the norm of each row.
Unlike PEFT's, the norm is without alpha / r, and the base's own bias, which is in y, is scaled too.

VeRA, where `vera_d` or `vera_b` is a number: BA is V B' D A', with A' `[r, in]` and B' `[out, r]` those of
`model.shared_parameters.<name>.`, `lora_A` and `lora_B`, and D `vera_D` `[r, r]` and V `vera_B` `[out, out]` the
module's own. The library trains D and V in full, not only the diagonals that the paper has, so the products DA' and VB'
are made once, and what is served is a LoRA.
"""

from __future__ import annotations

from torch import Tensor

from server.adapters.adapterhub.part import HubPart
from server.adapters.deltas import in_turn, low_rank, output_scale
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
    "use_dora",
    "vera_b",  # its value, as the next one's, is what training began with
    "vera_d",
)
_TRAINING_ONLY = ("dropout", "init_weights", "init_weights_seed", "dtype")
_UNSUPPORTED = ("use_gating",)
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
    if mode == "scale":
        _check_scale(part, rank)
    alpha = checkpoint.number("alpha", checkpoint.config.get("alpha")) if part.version >= _ALPHA_SINCE else float(rank)
    modules = _modules(part)
    sites = [f"model.layers.{layer}.{module}" for layer in part.layers(base) for module in modules]
    if not sites:
        raise AdapterError("bad_config", "leave_out leaves no layer to the adapter", "leave_out")
    for site in sites:
        if site not in base.sites:
            raise AdapterError("base_mismatch", f"this base has no module {site}, which the adapter changes", site)
    if mode == "scale":
        return {site: _scale(part, base, site, alpha) for site in sites}, None
    factors = _vera_factors(part, base, sites, rank) if _is_vera(part) else _lora_factors(part, base, sites, rank)
    return {site: _update(part, base, site, *own, alpha / rank) for site, own in factors.items()}, rank


def _check_scale(part: HubPart, rank: int) -> None:
    """Refuse what the library has no (IA)³ of."""
    for key, is_wrong in (("r", rank != 1), ("use_dora", part.checkpoint.config.get("use_dora"))):
        if is_wrong:
            message = f"{key} is {part.checkpoint.config[key]} with composition_mode 'scale', which the library refuses"
            raise AdapterError("unsupported_method", message, key)


def _scale(part: HubPart, base: BaseShape, site: str, alpha: float) -> RowDelta:
    """Take (IA)³'s vector of a module."""
    key = f"{site}.loras.{part.name}.lora_B"
    scale = part.checkpoint.take(key, (base.sites[site].outputs, 1)).flatten()
    return output_scale(part.checkpoint.finite(key, scale * alpha))


def _update(part: HubPart, base: BaseShape, site: str, down: Tensor, up: Tensor, scaling: float) -> RowDelta:
    """Of A `[r, in]` and B `[out, r]`, and of DoRA's magnitudes, which it takes."""
    checkpoint, key = part.checkpoint, f"{site}.loras.{part.name}"
    update = low_rank(down, checkpoint.finite(f"{key}.lora_B", up * scaling).t())
    if not checkpoint.config.get("use_dora"):
        return update
    magnitude = checkpoint.take(f"{key}.m.weight", (base.sites[site].outputs, 1)).flatten()
    scale = (magnitude.float() / lora.row_norms(base.weight(site), down, up)).to(magnitude.dtype)
    return in_turn(update, output_scale(checkpoint.finite(f"{key}.m.weight", scale)), is_relative=True)


def _is_vera(part: HubPart) -> bool:
    """As the library tells it: a whole number makes none."""
    return any(isinstance(part.checkpoint.config.get(key), float) for key in ("vera_d", "vera_b"))


def _lora_factors(part: HubPart, base: BaseShape, sites: list[str], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Each module's A and B."""
    take = part.checkpoint.take
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for site in sites:
        shape, key = base.sites[site], f"{site}.loras.{part.name}.lora_"
        factors[site] = take(f"{key}A", (rank, shape.inputs)), take(f"{key}B", (shape.outputs, rank))
    return factors


def _vera_factors(part: HubPart, base: BaseShape, sites: list[str], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Each module's D A' and V B'."""
    checkpoint, shared = part.checkpoint, f"model.shared_parameters.{part.name}.lora_"
    widths = {(base.sites[site].inputs, base.sites[site].outputs) for site in sites}
    if len(widths) > 1:
        message = f"{shared}A and {shared}B are one pair of matrices, and the adapter's modules are of different widths"
        raise AdapterError("base_mismatch", message, "attn_matrices")
    ((inputs, outputs),) = widths
    down = checkpoint.take(f"{shared}A", (rank, inputs)).float()
    up = checkpoint.take(f"{shared}B", (outputs, rank)).float()
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for site in sites:
        key = f"{site}.loras.{part.name}.vera_"
        inner, outer = checkpoint.take(f"{key}D", (rank, rank)), checkpoint.take(f"{key}B", (outputs, outputs))
        checkpoint.expand(f"{key}B", rank * (inputs + outputs))
        own = (inner.float() @ down).to(base.dtype), (outer.float() @ up).to(base.dtype)
        factors[site] = checkpoint.finite(f"{key}D", own[0]), checkpoint.finite(f"{key}B", own[1])
    return factors


def _modules(part: HubPart) -> list[str]:
    """The modules of a layer that the config names."""
    config = part.checkpoint.config
    matrices = config.get("attn_matrices") or []
    if not isinstance(matrices, list) or not all(
        isinstance(letter, str) and letter in _ATTENTION for letter in matrices
    ):
        message = f"attn_matrices is {matrices!r}; it must be a list of {', '.join(_ATTENTION)}"
        raise AdapterError("bad_config", message, "attn_matrices")
    modules = [_ATTENTION[letter] for letter in matrices] if config.get("selfattn_lora") else []
    modules += ["mlp.down_proj"] if config.get("intermediate_lora") else []
    modules += ["mlp.up_proj"] if config.get("output_lora") else []
    if not modules:
        message = "none of selfattn_lora, intermediate_lora, output_lora is set: the adapter changes nothing"
        raise AdapterError("bad_config", message, "attn_matrices")
    return modules
