"""Decoder layers of the usual form, in two calls for a short step: see `server.model.short_steps`.

x → h = x + o(attention of norm(x)), h → h + down(f(gate(norm(h))) ⊙ up(norm(h))), with rotated queries and keys, which
may have norms of their own. A layer is tried on what the base itself passes to it at positions from the first to the
last, and with norms that give less and more, so that neither an epsilon nor a bound on what follows them is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from server.model.agreement import agree
from server.model.attention import Attention, AttentionOptions
from server.model.fused import known_activation
from server.model.short_kernels import MOST_TOKENS, NORM, ROTATION
from server.model.short_steps import Fields, ShortSteps, multiplication, widths
from server.model.sites import Sites

_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")  # of the attention
_TRIALS = ((1e-3, 1e-3), (1.0, 1.0), (1.0, 1e2))  # magnitudes of a layer's input, and factors on what its norms give
_Run = Callable[[Tensor, Attention], Any]  # the base, at positions `[MOST_TOKENS]`


@dataclass(frozen=True)
class _Parts:
    """What a layer seems to be made of."""

    products: dict[str, Fields]
    norms: dict[str, tuple[Tensor, float]]  # weight and epsilon
    activation: tuple[str, str]


@dataclass(frozen=True)
class _AttentionCall:
    """How a layer calls the attention."""

    layer: int
    options: AttentionOptions
    heads: dict[str, int]  # of q, k, v
    head_dim: int


class _Recorder:
    """An attention that is none: of each token by itself, from its query, key and value."""

    def __init__(self) -> None:
        self.calls: list[_AttentionCall] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `Attention`."""
        _, heads, head_dim = query.shape
        self.calls.append(
            _AttentionCall(layer, options, {"q": heads, "k": key.shape[1], "v": value.shape[1]}, head_dim)
        )
        return query - (key + 2 * value).repeat_interleave(heads // key.shape[1], 1)


class _ShortLayer:
    """One layer's two programs and what they pass to each other."""

    def __init__(
        self,
        short: ShortSteps,
        parts: _Parts,
        call: _AttentionCall,
        rotary_width: int,
        offset: float,
        factor: float = 1.0,
    ) -> None:
        """`offset` is what the class adds to a norm's weight; for trials a factor on what norms give, but for heads."""
        self._call = call
        self._scales = {name: weight + offset if offset else weight for name, (weight, _) in parts.norms.items()}
        if factor != 1:
            self._scales |= {name: self._scales[name] * factor for name in _NORMS}
        self._epsilons = {name: epsilon for name, (_, epsilon) in parts.norms.items()}
        inner, width = widths(parts.products["down_proj"])
        self._projected = {name: short.buffer(name, widths(parts.products[f"{name}_proj"])[1]) for name in "qkv"}
        self._heads = [
            [buffer[:tokens].view(tokens, -1, call.head_dim) for buffer in self._projected.values()]
            for tokens in range(1, MOST_TOKENS + 1)
        ]
        normed, middle = (short.buffer(name, width) for name in ("normed", "middle"))
        gated = short.buffer("gated", inner)
        before = self._projections(parts, normed)
        rotations = len(before), len(before) + 1
        for name in "qk":
            buffer = self._projected[name]
            head = {"heads": call.heads[name], "output_width": call.head_dim, "rotary_width": rotary_width}
            before.append({"kind": ROTATION, "barrier": 0, **head, **_between(buffer, buffer)})
        given = {name: [(place, name) for place in rotations] for name in ("cos", "sin")}
        self._before = short.program(before, {"hidden": [(0, "inputs")], **given})
        gate = short.gated_operation(parts.products["gate_proj"], parts.products["up_proj"], parts.activation)
        behind = [
            parts.products["o_proj"] | {"outputs": middle},
            self._norm("post_attention_layernorm") | _between(middle, normed),
            gate | _between(normed, gated),
            parts.products["down_proj"] | {"inputs": gated, "added": middle},
        ]
        given = {"attended": [(0, "inputs")], "hidden": [(0, "added")], "outputs": [(3, "outputs")]}
        self._behind = short.program(behind, given)

    def _projections(self, parts: _Parts, normed: Tensor) -> list[Fields]:
        """The first norm, queries, keys and values, and the norms of the first two where there are any."""
        operations = [self._norm("input_layernorm") | {"outputs": normed}]
        for name, buffer in self._projected.items():
            operations.append(parts.products[f"{name}_proj"] | _between(normed, buffer))
            if name != "v":
                operations[-1]["barrier"] = 0
        for name in _HEAD_NORMS:
            if name in self._scales:
                buffer = self._projected[name[0]]
                heads = buffer.shape[1] // len(self._scales[name])
                operations.append(self._norm(name) | {"heads": heads, **_between(buffer, buffer)})
        return operations

    def _norm(self, name: str) -> Fields:
        scale = self._scales[name]
        epsilon = self._epsilons[name]
        return {"kind": NORM, "scale": scale, "input_width": len(scale), "epsilon": epsilon}

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        """`hidden` `[1, tokens, width]`, `cos` and `sin` `[1, tokens, rotary width]`."""
        call, tokens = self._call, hidden.shape[1]
        hidden = hidden.contiguous()
        self._before.run(tokens, hidden=hidden, cos=cos.contiguous(), sin=sin.contiguous())
        query, key, value = self._heads[tokens - 1]
        attended = attention.attend(call.layer, query, key, value, call.options).contiguous()
        outputs = torch.empty_like(hidden)
        self._behind.run(tokens, attended=attended, hidden=hidden, outputs=outputs)
        return outputs


def _between(inputs: Tensor, outputs: Tensor) -> Fields:
    return {"inputs": inputs, "outputs": outputs}


@torch.inference_mode()
def shorten_layers(model: nn.Module, sites: Sites, short: ShortSteps, run: _Run, max_model_len: int) -> Iterator[str]:
    """Give the layers for which it is equal the form for short steps; their names."""
    candidates = {name: parts for name, module in model.named_modules() if (parts := _parts(module, sites))}
    positions = torch.linspace(1, max_model_len - 1, MOST_TOKENS).long()
    passed = _passed(model, candidates, partial(run, positions))
    for name, parts in candidates.items():
        module = model.get_submodule(name)
        form = _equal_form(module, parts, short, *passed[name]) if name in passed else None
        if form is not None:
            names = frozenset(site for site in sites.shapes if site.startswith(f"{name}."))
            module.forward = _either(form, module.forward, sites, names)
            yield name


def _either(form: _ShortLayer, own: Callable[..., Any], sites: Sites, names: frozenset[str]) -> Callable[..., Any]:
    """A layer's forward: the form where it can be used."""

    def forward(hidden: Tensor, *others: Any, **named: Any) -> Any:
        if not 0 < hidden.shape[1] <= MOST_TOKENS or sites.touches(names):
            return own(hidden, *others, **named)
        cos, sin = named["position_embeddings"]
        return form(hidden, cos, sin, named["medley_attention"])

    return forward


def _parts(layer: nn.Module, sites: Sites) -> _Parts | None:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    found: dict[str, Fields] = {}
    for name in _PRODUCTS:
        module = getattr(attention, name, getattr(mlp, name, None))
        operation = multiplication(module) if isinstance(module, nn.Module) and sites.is_packed(module) else None
        if operation is None:
            return None
        found[name] = operation
    norms: dict[str, tuple[Tensor, float]] = {}
    for name in _NORMS + _HEAD_NORMS:
        norm = getattr(layer if name in _NORMS else attention, name, None)
        weight = getattr(norm, "weight", None)
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if isinstance(weight, Tensor) and weight.dtype == torch.float32 and isinstance(epsilon, float):
            norms[name] = weight.detach().contiguous(), epsilon
    activation = known_activation(getattr(mlp, "act_fn", None))
    if activation is None or not norms.keys() >= set(_NORMS):
        return None
    return _Parts(found, norms, activation)


def _fits(parts: _Parts, call: _AttentionCall, hidden: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether all widths are those of the usual form: what reads by address asks for no shape."""
    width, inner = hidden.shape[-1], widths(parts.products["gate_proj"])[1]
    usual = {name: (width, call.heads[name[0]] * call.head_dim) for name in _PRODUCTS[:3]}
    usual |= {"o_proj": (usual["q_proj"][1], width), "down_proj": (inner, width)}
    usual |= {"gate_proj": (width, inner), "up_proj": (width, inner)}
    products_fit = all(widths(operation) == usual[name] for name, operation in parts.products.items())
    norms_fit = all(len(parts.norms[name][0]) == width for name in _NORMS)
    heads_fit = all(len(parts.norms[name][0]) == call.head_dim for name in _HEAD_NORMS if name in parts.norms)
    rotary = cos.shape[-1]
    angles_fit = cos.shape == sin.shape == (1, MOST_TOKENS, rotary) and rotary <= call.head_dim and rotary % 2 == 0
    is_step = hidden.shape[:2] == (1, MOST_TOKENS) and hidden.dim() == 3
    is_float32 = all(each.dtype == torch.float32 for each in (hidden, cos, sin))
    return products_fit and norms_fit and heads_fit and angles_fit and is_step and is_float32


def _passed(
    model: nn.Module, names: Iterable[str], run: Callable[[Attention], Any]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the base passes to each of these layers."""
    passed: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        passed[name] = arguments, named

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name), with_kwargs=True) for name in names
    ]
    try:
        if hooks:
            run(_Recorder())
    finally:
        for hook in hooks:
            hook.remove()
    return passed


def _equal_form(
    module: nn.Module, parts: _Parts, short: ShortSteps, arguments: tuple[Any, ...], named: dict[str, Any]
) -> _ShortLayer | None:
    """The form of a layer that gives what its class gives, if one does."""
    match named.get("position_embeddings"):
        case (Tensor() as cos, Tensor() as sin) if arguments:
            pass
        case _:
            return None
    recorder = _Recorder()
    trials = [(arguments[0] * magnitude, factor) for magnitude, factor in _TRIALS]
    own = []
    for hidden, factor in trials:
        with _scaled_norms(module, factor):
            own.append(module.forward(hidden, *arguments[1:], **{**named, "medley_attention": recorder}))
    is_usual = len(recorder.calls) == len(own) and all(isinstance(each, Tensor) for each in own)
    if not is_usual or not _fits(parts, recorder.calls[0], arguments[0], cos, sin):
        return None

    def gives_the_same(offset: float) -> bool:
        for (hidden, factor), expected in zip(trials, own, strict=True):
            form = _ShortLayer(short, parts, recorder.calls[0], cos.shape[-1], offset, factor)
            added = form(hidden, cos, sin, recorder) - hidden
            if not agree(added, expected - hidden, rounded_at=float(hidden.abs().max())):
                return False
        return True

    for offset in (0.0, 1.0):
        if gives_the_same(offset):
            return _ShortLayer(short, parts, recorder.calls[0], cos.shape[-1], offset)
    return None


@contextmanager
def _scaled_norms(layer: nn.Module, factor: float) -> Iterator[None]:
    """Inside the block a layer's norms, those of heads left out, give so many times what they give."""
    norms = [getattr(layer, name) for name in _NORMS]
    forwards = [norm.forward for norm in norms]
    for norm, forward in zip(norms, forwards, strict=True):
        norm.forward = partial(_scaled, forward, factor)
    try:
        yield
    finally:
        for norm, forward in zip(norms, forwards, strict=True):
            norm.forward = forward


def _scaled(forward: Callable[[Tensor], Tensor], factor: float, inputs: Tensor) -> Tensor:
    return forward(inputs) * factor
