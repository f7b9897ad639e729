"""Bottleneck adapters: small networks after a layer's sub-blocks, or beside them.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019 (`double_seq_bn`); Pfeiffer et al.,
"AdapterHub", EMNLP 2020 (`seq_bn`); He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR
2022 (`par_bn`); Rücklé et al., "AdapterDrop", EMNLP 2021 (`leave_out`); Compacter: see `compacter`.

Checkpoint (AdapterHub, no `architecture` in its config): for each layer that is not in `leave_out`, under
`<layer>.attention_adapters.adapters.<name>.` with `mh_adapter` and `<layer>.output_adapters.adapters.<name>.` with
`output_adapter`: `adapter_down.0.weight` `[width, d]` and `.bias`, `adapter_up.weight` `[d, width]` and `.bias`;
`adapter_norm_before`, `adapter_norm_after` (weight and bias `[d]`) and `scaling` where the config says so. The width is
max(1, ⌊d / reduction_factor⌋). What is computed: `bottleneck_kind`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from server.adapters.adapterhub.bottleneck_kind import ACTIVATIONS, Flags, Network
from server.adapters.adapterhub.compacter import MOST_TERMS, Compacter
from server.adapters.adapterhub.part import HubPart
from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.errors import AdapterError
from server.model import BaseShape, RowDelta

NAME = "bottleneck"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: small network",
    formats=("AdapterHub seq_bn, double_seq_bn, par_bn, adapter_plus, compacter, compacter++",),
    parameters="2·h·b + b + h for each place, b the width of the bottleneck; two places with double_seq_bn",
    cost="two thin matrix products and an activation at each place",
)

_FLAGS = {
    "is_parallel": False,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
}
_GATE = "use_gating"
_UNSUPPORTED = (_GATE, "inv_adapter", "cross_adapter")
_USED = (
    *_FLAGS,
    *_UNSUPPORTED,
    "architecture",
    "mh_adapter",
    "output_adapter",
    "reduction_factor",
    "non_linearity",
    "scaling",
    "leave_out",
    "phm_layer",
    "phm_dim",
    "phm_bias",
    "shared_phm_rule",
    "factorized_phm_rule",
    "shared_W_phm",
    "factorized_phm_W",
)
_TRAINING_ONLY = (
    "dropout",
    "stochastic_depth",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",  # of inv_adapter
    "hypercomplex_nonlinearity",
    "learn_phm",
    "phm_c_init",
    "phm_init_range",
    "phm_rank",  # the tensors say it
)
_PLACES = {True: "attention_adapters", False: "output_adapters"}
_IN_PLACE = {True: "mh_adapter", False: "output_adapter"}


def read(part: HubPart, base: BaseShape) -> Adapter:
    """See the module."""
    checkpoint = part.checkpoint
    deltas = take_places(part, base)
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def take_places(part: HubPart, base: BaseShape) -> dict[str, RowDelta]:
    """The deltas of a bottleneck's config, a file's only one or one of a union."""
    flags, networks = take_networks(part, base)
    return {site: network.delta(flags) for site, network in networks.items()}


def take_networks(part: HubPart, base: BaseShape, *, is_fused: bool = False) -> tuple[Flags, dict[str, Network]]:
    """A bottleneck's flags, and its tensors by the site of the block. One that `is_fused` may have a gate, whose
    tensors are left: a fusion does not use it."""
    settings, name, numbers = part.checkpoint.config, part.name, part.layers(base)
    part.checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=())
    reader = _Reader(part.checkpoint, base, settings, name, is_fused)
    flags = reader.flags()
    layers = list(dict.fromkeys(block.layer for block in base.blocks))
    if len(base.blocks) != 2 * len(base.layers) or len(layers) != len(base.layers):
        raise AdapterError(
            "base_mismatch",
            "bottleneck adapters need layers that add attention, then feed-forward network to the residual stream; "
            "this base's do otherwise",
            "config",
        )
    networks: dict[str, Network] = {}
    for block in base.blocks:
        number = layers.index(block.layer)
        if settings.get(_IN_PLACE[block.is_attention]) and number in numbers:
            prefix = f"{block.layer}.{_PLACES[block.is_attention]}.adapters.{name}."
            networks[block.site] = reader.network(prefix, number)
    if not networks:
        raise AdapterError("bad_config", "the adapter is in no layer: mh_adapter, output_adapter, leave_out", "config")
    return flags, networks


@dataclass(frozen=True, eq=False)
class _Reader:
    """Takes the tensors of one config."""

    checkpoint: Checkpoint
    base: BaseShape
    settings: Mapping[str, Any]
    name: str
    is_fused: bool

    def flags(self) -> Flags:
        """Which of the mathematics. Raises `unsupported_method` for what is not served."""
        for key in _UNSUPPORTED:
            if self.settings.get(key) and not (self.is_fused and key == _GATE):
                message = f"{key} = {self.settings[key]!r} is not supported for bottleneck adapters"
                if key == _GATE:
                    message += ": the library's gate averages over all tokens of a pass, so an answer has no one value"
                raise AdapterError("unsupported_method", message, key)
        activation = self.settings.get("non_linearity")
        if not isinstance(activation, str) or activation.lower() not in ACTIVATIONS:
            message = f"non_linearity {activation!r} is not served here; {', '.join(ACTIVATIONS)} are"
            raise AdapterError("unsupported_method", message, "non_linearity")
        values = {key: self._flag(key, default) for key, default in _FLAGS.items()}
        return Flags(non_linearity=activation.lower(), **values)

    def _flag(self, key: str, default: bool) -> bool:
        value = self.settings.get(key, default)
        if not isinstance(value, bool):
            raise AdapterError("bad_config", f"{key} is {value!r}; it must be true or false", key)
        return value

    def network(self, prefix: str, layer: int) -> Network:
        """The tensors of one place."""
        hidden, take = self.base.embedding_width, self.checkpoint.take
        width = self._width(layer)
        before = self._norm(f"{prefix}adapter_norm_before") if self._flag("ln_before", False) else ()
        if before:  # saved a second time, as the first of the modules in front of the bottleneck
            again = self._norm(f"{prefix}adapter_down.0")
            if not all(torch.equal(left, right) for left, right in zip(before, again, strict=True)):
                name = f"{prefix}adapter_down.0.weight"
                raise AdapterError("base_mismatch", f"tensor {name} differs from that of adapter_norm_before", name)
        down, down_bias = self._linear(f"{prefix}adapter_down.{len(before) // 2}", "down", hidden, width)
        up, up_bias = self._linear(f"{prefix}adapter_up", "up", width, hidden)
        scaling = self.settings.get("scaling", 1.0)
        if scaling in ("learned", "channel"):
            key, factor = f"{prefix}scaling", take(f"{prefix}scaling", (1 if scaling == "learned" else hidden,))
        else:
            key, factor = "scaling", torch.tensor(self.checkpoint.number("scaling", scaling), dtype=torch.float64)
        after = self._norm(f"{prefix}adapter_norm_after") if self._flag("ln_after", False) else ()
        if self.settings.get(_GATE):
            take(f"{prefix}gate.weight", (1, hidden))
            take(f"{prefix}gate.bias", (1,))
        finite = self.checkpoint.finite
        return Network(
            down.t(),
            down_bias,
            finite(key, (up * factor).to(up.dtype)),
            finite(key, (up_bias * factor).to(up.dtype)),
            (*before, *after),
        )

    def _norm(self, name: str) -> tuple[Tensor, Tensor]:
        shape = (self.base.embedding_width,)
        return self.checkpoint.take(f"{name}.weight", shape), self.checkpoint.take(f"{name}.bias", shape)

    def _linear(self, name: str, position: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Its matrix, `[in, out]`, and bias `[out]`."""
        if not self.settings.get("phm_layer"):
            weight = self.checkpoint.take(f"{name}.weight", (columns, rows)).t()
            return weight, self.checkpoint.take(f"{name}.bias", (columns,))
        if min(rows, columns) % self._compacter.terms:
            raise AdapterError("bad_config", f"phm_dim must divide the width of {name}", "phm_dim")
        matrix = self._compacter.matrix(name, position, rows, columns).to(self.base.dtype)
        bias = torch.zeros(columns, dtype=self.base.dtype)
        if self.settings.get("phm_bias", True):
            bias = self.checkpoint.take(f"{name}.b", (columns,))
        return self.checkpoint.finite(name, matrix), bias

    @cached_property
    def _compacter(self) -> Compacter:
        part = f"shared_parameters.{self.name}."
        shared = next((key for key in self.checkpoint.names if part in key), part)
        terms = self.settings.get("phm_dim")
        if type(terms) is not int or terms < 1 or self.base.embedding_width % terms:
            message = f"phm_dim is {terms!r}; it must be a whole number that divides {self.base.embedding_width}"
            raise AdapterError("bad_config", message, "phm_dim")
        if terms > MOST_TERMS:
            raise AdapterError("too_large", f"phm_dim is {terms}; at most {MOST_TERMS} is served", "phm_dim")
        return Compacter(self.checkpoint, self.settings, terms, shared[: shared.index(part) + len(part)])

    def _width(self, layer: int) -> int:
        factor = self.settings.get("reduction_factor")
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor.get("default"))
        value = self.checkpoint.number("reduction_factor", factor)
        if value <= 0:
            message = f"reduction_factor is {factor!r} for layer {layer}; it must be above 0"
            raise AdapterError("bad_config", message, "reduction_factor")
        width = max(1, int(self.base.embedding_width // value))
        if width > self.base.widest:  # its bias is one row of the pool
            message = (
                f"reduction_factor {factor!r} makes a bottleneck {width} wide; at most {self.base.widest} is served"
            )
            raise AdapterError("too_large", message, "reduction_factor")
        return width
