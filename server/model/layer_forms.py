"""Finds the decoder layers of a base that have the usual form, and has them run as programs (`layer_programs`).

A layer is tried on what the base itself passes to it at positions from the first to the last, and with norms that give
less and more, so that neither an epsilon nor a bound on what follows them is missed. Then all layers are tried
together, within the base: what a class does between them must be nothing. Nothing here knows a class by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from server.model.activations import Activation, known_activation
from server.model.agreement import agree
from server.model.attention import Attention, AttentionOptions, AttentionPlan, DecodeGroup
from server.model.decode_kernel import DecodeKernel
from server.model.kv_cache import KVCache, LayerShape
from server.model.layer_operations import HEAD_NORMS, NORMS, PRODUCTS, LayerForm
from server.model.layer_programs import LayerStack, stack_or_own
from server.model.module_calls import ModuleCall, recorded_calls
from server.model.norms import OFFSETS, weight_and_epsilon
from server.model.paged_attention import PagedAttention
from server.model.programs import TRIED_TOKENS, Fields, Programs, multiplication, widths
from server.model.sites import Sites

TRIALS = ((1e-3, 1e-3), (1.0, 1.0), (1.0, 1e2))  # magnitudes of a layer's input, and factors on what its norms give
Run = Callable[[Tensor, Attention], Tensor]
"""The base: logits `[TRIED_TOKENS, vocabulary]` of some tokens at positions `[TRIED_TOKENS]`."""


@dataclass(frozen=True)
class _Parts:
    """What a layer seems to be made of."""

    products: dict[str, Fields]
    sites: dict[str, str]
    norms: dict[str, tuple[Tensor, float]]  # weight and epsilon
    activation: Activation


@dataclass(frozen=True)
class _AttentionCall:
    """How a layer calls the attention."""

    layer: int
    options: AttentionOptions
    heads: dict[str, int]  # of q, k, v
    head_dim: int

    def is_like(self, other: _AttentionCall) -> bool:
        """Whether all is the same, sinks the same tensor: programs name its address."""
        sinks, others = self.options.sinks, other.options.sinks
        return sinks is others and self == replace(other, options=replace(other.options, sinks=sinks))


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


@torch.inference_mode()
def run_as_programs(
    model: nn.Module,
    sites: Sites,
    programs: Programs,
    layers: Sequence[LayerShape],
    run: Run,
    max_model_len: int,
) -> LayerStack | None:
    """Have the layers for which it is equal run as programs; None where there are none."""
    candidates = {name: parts for name, module in model.named_modules() if (parts := _parts(name, module, sites))}
    if not candidates:
        return None
    positions = torch.linspace(0, max_model_len - 1, TRIED_TOKENS).long()
    with recorded_calls(map(model.get_submodule, candidates)) as recorded:
        run(positions, _Recorder())
    calls = {call.module: call for call in recorded}
    forms = [
        form
        for name, parts in candidates.items()
        if (call := calls.get(model.get_submodule(name))) is not None
        and (form := _equal_form(name, parts, programs, call)) is not None
    ]
    forms = [form for form in forms if form.shape == forms[0].shape]  # they share their buffers
    if not forms:
        return None
    steps = [calls[model.get_submodule(form.name)] for form in forms]
    stack = LayerStack(programs, forms, is_chain=all(_follows(layer, before) for before, layer in pairwise(steps)))
    modules = [model.get_submodule(name) for name in stack.names]
    attentions: list[Attention] = [_Recorder(), own_token_attention(layers)]  # two calls a layer, and one for all
    expected = [run(positions, attention) for attention in attentions]
    own = [module.forward for module in modules]
    for index, module in enumerate(modules):
        module.forward = stack_or_own(stack, index, own[index], sites.plan)
    given = [run(positions, attention) for attention in attentions]
    if all(agree(each, other) for each, other in zip(given, expected, strict=True)):
        return stack
    for module, forward in zip(modules, own, strict=True):
        module.forward = forward
    return None


def own_token_attention(layers: Sequence[LayerShape]) -> PagedAttention:
    """The attention of a step of `TRIED_TOKENS` rows that each see their own token alone."""
    rows = TRIED_TOKENS
    cache = KVCache(layers, rows + 1, 1, dtype=torch.float32, device=torch.device("cpu"))
    pages = torch.arange(1, rows + 1)
    group = DecodeGroup(0, rows, pages[:, None], torch.ones(rows, dtype=torch.long))
    plan = AttentionPlan(pages, None, torch.arange(rows), [group], [])
    return PagedAttention(cache, plan, decode_kernel=DecodeKernel())


def _follows(layer: ModuleCall, before: ModuleCall) -> bool:
    """Whether a layer gets what the one before gives, and the same angles."""
    angles, angles_before = layer.named.get("position_embeddings"), before.named.get("position_embeddings")
    return bool(layer.arguments) and layer.arguments[0] is before.output and angles is angles_before


def _parts(name: str, layer: nn.Module, sites: Sites) -> _Parts | None:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    found: dict[str, Fields] = {}
    for product in PRODUCTS:
        module = getattr(attention, product, getattr(mlp, product, None))
        operation = multiplication(module) if isinstance(module, nn.Module) and sites.is_packed(module) else None
        if operation is None:
            return None
        found[product] = operation
    norms = {
        each: weighted
        for each in NORMS + HEAD_NORMS
        if (weighted := norm_weight(getattr(layer if each in NORMS else attention, each, None)))
    }
    activation = known_activation(getattr(mlp, "act_fn", None))
    if activation is None or not norms.keys() >= set(NORMS):
        return None
    own = {product: f"{name}.{'self_attn' if hasattr(attention, product) else 'mlp'}.{product}" for product in PRODUCTS}
    return _Parts(found, own, norms, activation)


def norm_weight(norm: object) -> tuple[Tensor, float] | None:
    """Weight and epsilon of what may be a norm that a kernel can compute."""
    parts = weight_and_epsilon(norm)
    return parts if parts is not None and parts[0].dtype == torch.float32 else None


def _fits(parts: _Parts, call: _AttentionCall, hidden: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether all widths are those of the usual form: what reads by address asks for no shape."""
    width, inner = hidden.shape[-1], widths(parts.products["gate_proj"])[1]
    usual = {name: (width, call.heads[name[0]] * call.head_dim) for name in PRODUCTS[:3]}
    usual |= {"o_proj": (usual["q_proj"][1], width), "down_proj": (inner, width)}
    usual |= {"gate_proj": (width, inner), "up_proj": (width, inner)}
    products_fit = all(widths(operation) == usual[name] for name, operation in parts.products.items())
    norms_fit = all(len(parts.norms[name][0]) == width for name in NORMS)
    heads_fit = all(len(parts.norms[name][0]) == call.head_dim for name in HEAD_NORMS if name in parts.norms)
    rotary = cos.shape[-1]
    angles_fit = cos.shape == sin.shape == (1, TRIED_TOKENS, rotary) and rotary <= call.head_dim and rotary % 2 == 0
    is_step = hidden.shape[:2] == (1, TRIED_TOKENS) and hidden.dim() == 3
    is_float32 = all(each.dtype == torch.float32 for each in (hidden, cos, sin))
    return products_fit and norms_fit and heads_fit and angles_fit and is_step and is_float32


def _equal_form(name: str, parts: _Parts, programs: Programs, call: ModuleCall) -> LayerForm | None:
    """The form of a layer that gives what its class gives, if one does."""
    match call.named.get("position_embeddings"):
        case (Tensor() as cos, Tensor() as sin) if call.arguments:
            pass
        case _:
            return None
    recorder, module = _Recorder(), call.module
    given, others = call.arguments[0], call.arguments[1:]
    trials = [(given * magnitude, factor) for magnitude, factor in TRIALS]
    own = []
    for hidden, factor in trials:
        with scaled([getattr(module, norm) for norm in NORMS], factor):
            own.append(module.forward(hidden, *others, **{**call.named, "medley_attention": recorder}))
    is_usual = len(recorder.calls) == len(own) and all(isinstance(each, Tensor) for each in own)
    is_usual = is_usual and all(each.is_like(recorder.calls[0]) for each in recorder.calls)
    if not is_usual or not _fits(parts, recorder.calls[0], given, cos, sin):
        return None
    for offset in OFFSETS:
        form = _form(name, parts, recorder.calls[0], cos.shape[-1], offset)
        if all(
            _agrees(form, factor, programs, (hidden, cos, sin), recorder, expected)
            for (hidden, factor), expected in zip(trials, own, strict=True)
        ):
            return form
    return None


def _form(name: str, parts: _Parts, call: _AttentionCall, rotary_width: int, offset: float) -> LayerForm:
    """`offset` is what the class adds to a norm's weight."""
    return LayerForm(
        name=name,
        products=parts.products,
        sites=parts.sites,
        scales={each: weight + offset if offset else weight for each, (weight, _) in parts.norms.items()},
        epsilons={each: epsilon for each, (_, epsilon) in parts.norms.items()},
        activation=parts.activation,
        layer=call.layer,
        options=call.options,
        heads=call.heads,
        head_dim=call.head_dim,
        rotary_width=rotary_width,
    )


def _agrees(
    form: LayerForm,
    factor: float,
    programs: Programs,
    given: tuple[Tensor, Tensor, Tensor],
    attention: Attention,
    expected: Tensor,
) -> bool:
    """Whether a form gives what is expected for a hidden state, cos and sin; its norms, but those of heads, give
    `factor` times what they give."""
    hidden = given[0]
    scaled = replace(form, scales=form.scales | {name: form.scales[name] * factor for name in NORMS})
    outputs = LayerStack(programs, [scaled], is_chain=False).forward(0, {}, *given, attention)
    assert outputs is not None, "there are no deltas"
    return agree(outputs - hidden, expected - hidden, rounded_at=float(hidden.abs().max()))


@contextmanager
def scaled(norms: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Inside the block norms give so many times what they give."""
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
