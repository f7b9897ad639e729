"""Bottleneck adapters as AdapterHub computes them, slowly: Houlsby, Pfeiffer, parallel, Compacter, stacks, fusion.

Notation: `h` [1, n, d] is the output of the sub-block (attention after `o_proj`, or the MLP), `r` [1, n, d] the
residual stream before it. A place without an adapter gives `h + r`. The library passes no layer norm to Llama's places,
so the "original layer norm" flags only decide where `r` is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, leaky_relu
from torch.nn.functional import linear as affine
from transformers.activations import ACT2FN


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The library's names: those of `transformers`, and "leakyrelu"."""
    if name.lower() == "leakyrelu":
        return leaky_relu
    found: Callable[[Tensor], Tensor] = ACT2FN[name.lower()]
    return found


def linear(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A saved `nn.Linear`, with or without bias."""
    stem = f"{name}." if name else ""
    return affine(x, tensors[f"{stem}weight"], tensors.get(f"{stem}bias"))


def mean_gate(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """σ(gate(x)), averaged over the tokens of this forward pass: [1, 1, outputs].

    The whole prompt in prefill, one token in each later step: the value depends on how a prompt is cut.
    """
    return torch.sigmoid(linear(tensors, name, x)).mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class Bottleneck:
    """One adapter at one place: its config, its tensors there, and those that it shares between places."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]

    def up(self, x: Tensor) -> Tensor:
        """scaling · up(f(down(norm(x)))). Fusion sees this: neither gated nor normed after."""
        number = 0
        if self.config["ln_before"]:  # it takes the first place of the saved nn.Sequential
            number = 1
            x = self._norm("adapter_norm_before", x)
        narrow = activation(self.config["non_linearity"])(self._project(f"adapter_down.{number}", "down", x))
        wide = self._project("adapter_up", "up", narrow)
        if "scaling" in self.tensors:  # "learned" (1,) or "channel" (d,)
            return wide * self.tensors["scaling"]
        return wide * float(self.config["scaling"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _project(self, name: str, position: str, x: Tensor) -> Tensor:
        if not self.config["phm_layer"]:
            return linear(self.tensors, name, x)
        y = x @ self._compacter(name, position)
        return y + self.tensors[f"{name}.b"] if self.config["phm_bias"] else y

    def _compacter(self, name: str, position: str) -> Tensor:
        """Compacter's dense matrix [in, out]: Σᵢ ruleᵢ ⊗ Wᵢ (arXiv:2106.04647)."""
        own = {key.removeprefix(f"{name}."): value for key, value in self.tensors.items() if key.startswith(f"{name}.")}
        rule_from = self.shared if self.config["shared_phm_rule"] else own
        if self.config["factorized_phm_rule"]:
            rule = rule_from["phm_rule_left"] @ rule_from["phm_rule_right"]
        else:
            rule = rule_from["phm_rule"]
        weights_from, stem = (self.shared, f"W_{position}") if self.config["shared_W_phm"] else (own, "W")
        if self.config["factorized_phm_W"]:
            weights = weights_from[f"{stem}_left"] @ weights_from[f"{stem}_right"]
        else:
            weights = weights_from[stem]
        return torch.stack([torch.kron(a, b) for a, b in zip(rule, weights, strict=True)]).sum(0)

    def enter(self, h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The adapter's input, and what its own residual connection adds."""
        if self.config["is_parallel"]:
            return r, r
        x = h + r if self.config["original_ln_before"] else h
        return x, h if self.config["residual_before_ln"] else x

    def run(self, x: Tensor, residual: Tensor) -> Tensor:
        """The adapter with its gate, its own norm and its own residual connection (a parallel one has none)."""
        y = self.up(x)
        if self.config["use_gating"]:
            y = y * mean_gate(self.tensors, "gate", x)
        sequential = not self.config["is_parallel"]
        early = self.config["adapter_residual_before_ln"]
        if sequential and early:
            y = y + residual
        if self.config["ln_after"]:
            y = self._norm("adapter_norm_after", y)
        return y + residual if sequential and not early else y

    def leave(self, y: Tensor, h: Tensor, r: Tensor) -> Tensor:
        """The new residual stream."""
        if self.config["is_parallel"]:
            y = y + h
        return y + r if self.config["original_ln_after"] else y


def stack(adapters: list[Bottleneck], h: Tensor, r: Tensor) -> Tensor:
    """One adapter, or several in a row. Of parallel ones only the last counts: each starts again from `r`."""
    y = h
    for adapter in adapters:
        x, residual = adapter.enter(y, r)
        y = adapter.run(x, residual)
    return adapters[-1].leave(y, h, r)


def fuse(
    adapters: list[Bottleneck], config: Mapping[str, Any], tensors: Mapping[str, Tensor], h: Tensor, r: Tensor
) -> Tensor:
    """AdapterFusion (arXiv:2005.00247): attention of each token over its adapters' outputs.

    The last adapter's config decides about input and residuals.
    """
    last = adapters[-1]
    x, residual = last.enter(h, r)
    query = h if config["query_before_ln"] and not last.config["is_parallel"] else x
    values = torch.stack([adapter.up(x) for adapter in adapters], dim=2)  # [1, n, adapters, d]
    if config["residual_before"]:
        values = values + residual[:, :, None]
    keys = values  # a residual in every key, like the key's bias, adds the same to each score: no weight changes
    query = linear(tensors, "query", query) if config["query"] else query
    keys = linear(tensors, "key", keys) if config["key"] else keys
    if config["value"] and config["value_before_softmax"]:
        values = linear(tensors, "value", values)
    weights = torch.softmax((query[:, :, None] * keys).sum(-1), dim=-1)  # no 1/√d
    y = (weights[..., None] * values).sum(2)
    if config["value"] and not config["value_before_softmax"]:
        y = linear(tensors, "value", y)
    if not config["residual_before"]:
        y = y + residual
    return last.leave(y, h, r)
