"""AdapterFusion: learned attention over the bottleneck adapters of several tasks.

Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", EACL 2021. Checkpoint: what
AdapterHub's library writes as several folders (`save_adapter_fusion`, `save_adapter`), put together by
`medley convert`. `adapter_config.json` is the fusion's own `adapter_fusion_config.json` (`name`; `adapter_names` in
order; `config`) and, as `adapters`, each fused adapter's `config` by its name. `adapter.safetensors` has the adapters'
tensors (see `bottleneck`) and, under `<layer>.<place>.adapter_fusion_layer.<name>.`, those of the fusion:
`query.weight`, `key.weight`, `value.weight` `[d, d]`, `query.bias`, `key.bias` `[d]`, as far as `query`, `key` and
`value` of its config say so. What is computed: `fusion_kind`.

As in the library, a fused adapter acts without its gate, its norm after and its own residual connection; its tensors of
these are checked and left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.adapters.adapterhub.bottleneck import take_networks
from server.adapters.adapterhub.bottleneck_kind import Flags, Network
from server.adapters.adapterhub.fusion_kind import FusionWeights, fusion
from server.adapters.adapterhub.part import HubPart
from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.errors import AdapterError
from server.model import BaseShape, RowDelta

NAME = "adapter_fusion"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: small networks, attention over them",
    formats=("AdapterHub AdapterFusion, joined with its adapters by `medley convert`",),
    parameters="for each place its bottlenecks', and 3·h² + 2·h; resident about 3·h·Σ(b + 1)",
    cost="three thin matrix products at each place, as wide as all its bottlenecks together",
)
ADAPTERS_KEY = "adapters"
NAMES_KEY = "adapter_names"
_USED = ("query", "key", "value", "query_before_ln", "value_before_softmax", "residual_before")
_TRAINING_ONLY = ("dropout_prob", "regularization", "value_initialized")
_UNSUPPORTED = ("temperature",)  # the library lowers it with every pass it makes
_PLACES = {True: "attention_adapters", False: "output_adapters"}


def read(part: HubPart, outer: Mapping[str, Any], base: BaseShape) -> Adapter:
    """The adapter of a checkpoint whose config `outer` is. See the module."""
    checkpoint = part.checkpoint
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=_UNSUPPORTED)
    members = [_member(part, name, config, base) for name, config in _configs(outer).items()]
    sites = set(members[0][1])
    for name, (_, networks) in zip(outer[NAMES_KEY], members, strict=True):
        if set(networks) != sites:
            message = f"the adapter '{name}' is in other places or layers than the first one; fused ones share theirs"
            raise AdapterError("unsupported_method", message, ADAPTERS_KEY)
    reader = _Fusion(checkpoint, part.name, base.embedding_width)
    deltas: dict[str, RowDelta] = {}
    for block in base.blocks:
        if block.site in sites:
            prefix = f"{block.layer}.{_PLACES[block.is_attention]}.adapter_fusion_layer.{part.name}."
            weights = reader.weights(prefix)
            there = [(flags, networks[block.site]) for flags, networks in members]
            deltas[block.site] = reader.delta(prefix, there, weights)
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))


def _configs(outer: Mapping[str, Any]) -> dict[str, Any]:
    """The fused adapters' configs by name, in the fusion's order."""
    names, configs = outer[NAMES_KEY], outer.get(ADAPTERS_KEY)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise AdapterError("bad_config", f"{NAMES_KEY} is {names!r}; it must be a list of names", NAMES_KEY)
    if not isinstance(configs, dict) or sorted(configs) != sorted(names):
        message = (
            f"{ADAPTERS_KEY} must have the config of each of {', '.join(names)}; `medley convert` puts the library's "
            "folders of a fusion and its adapters together"
        )
        raise AdapterError("bad_config", message, ADAPTERS_KEY)
    for name, config in configs.items():
        if not isinstance(config, dict) or config.get("architecture") is not None:
            message = f"the fused adapter '{name}' is no bottleneck; only bottlenecks are fused"
            raise AdapterError("unsupported_method", message, ADAPTERS_KEY)
    return {name: configs[name] for name in names}


def _member(part: HubPart, name: str, config: dict[str, Any], base: BaseShape) -> tuple[Flags, dict[str, Network]]:
    own = HubPart(part.checkpoint.part(config), name, part.version)
    return take_networks(own, base, is_fused=True)


@dataclass(frozen=True, eq=False)
class _Fusion:
    """Takes the fusion's own tensors."""

    checkpoint: Checkpoint
    name: str
    width: int

    def weights(self, prefix: str) -> FusionWeights:
        """Those of one place."""
        query_bias = torch.zeros(self.width, dtype=torch.float64)
        if self._flag("query", default=True):
            query_bias = self.checkpoint.take(f"{prefix}query.bias", (self.width,)).double()
        if self._flag("key", default=True):
            self.checkpoint.take(f"{prefix}key.bias", (self.width,))  # the same in every score
        query, key, value = (self._matrix(prefix, part) for part in ("query", "key", "value"))
        return FusionWeights(query, query_bias, key, value)

    def _matrix(self, prefix: str, part: str) -> Tensor:
        if not self._flag(part, default=True):
            return torch.eye(self.width, dtype=torch.float64)
        return self.checkpoint.take(f"{prefix}{part}.weight", (self.width, self.width)).double()

    def delta(self, prefix: str, members: list[tuple[Flags, Network]], weights: FusionWeights) -> RowDelta:
        """Of one place."""
        self._flag("value_before_softmax", default=True)  # W_v has no bias: before or after is the same
        delta = fusion(
            members,
            weights,
            query_before_ln=self._flag("query_before_ln", default=False),
            residual_before=self._flag("residual_before", default=False),
        )
        for block in delta.blocks:
            self.checkpoint.finite(prefix.rstrip("."), block)
        return delta

    def _flag(self, key: str, *, default: bool) -> bool:
        value = self.checkpoint.config.get(key, default)
        if not isinstance(value, bool):
            raise AdapterError("bad_config", f"{key} is {value!r}; it must be true or false", key)
        return value
