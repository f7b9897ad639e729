"""The machine's limit for given steps: their matrix products alone, each in the fastest way that torch has.

A step of M tokens passes M rows through every linear module of each layer and its wanted rows through the head. Each
of these products is timed at the M that the steps really had, with weights that come from memory as in the model, in
four ways: plain, modules of one input joined into one weight (q, k, v; gate and up), and both of these with weights
that oneDNN has packed. The limit takes the fastest way of each.

Two limits: `linear` is these products alone. `with_attention` adds the two products of attention over the keys
and values that each row has, contiguous and without a mask: for rows that decode, and for whole prompts.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bases import BaseSize
from benchmarks.workload import Job
from server.engine.protocol import StepOutput
from server.model.heap import move_to_huge_pages

_MAX_POINTS = 6  # token counts that are timed; between them time is taken as linear
_LEAST_SECONDS = 0.02  # of one timing
_LEAST_CALLS = 3
_CACHE_BYTES = 256 * 1024**2  # more than a processor's caches hold
_PACK_ROWS = 1024  # rows for which oneDNN lays the weights out


@dataclass(frozen=True)
class Step:
    """What one step of the engine worked on."""

    tokens: int  # rows of every linear module of the layers
    logits: int  # rows of the head
    decoding: tuple[int, ...] = ()  # context of each row that decodes, its own token included
    prompts: tuple[int, ...] = ()  # tokens of each prompt that was run whole


@dataclass(frozen=True)
class Product:
    """Linear modules that have one input, `times` in the model."""

    width: int  # of the input
    outputs: tuple[int, ...]  # of each module
    times: int
    is_head: bool = False


@dataclass(frozen=True)
class LimitSeconds:
    """What the steps take at least."""

    linear: float
    with_attention: float


def products(size: BaseSize) -> list[Product]:
    """Every linear module of a base of `benchmarks.bases`."""
    width, inner = size.width, size.feedforward
    return [
        Product(width, (width, width, width), size.layers),
        Product(width, (width,), size.layers),
        Product(width, (inner, inner), size.layers),
        Product(inner, (width,), size.layers),
        Product(width, (size.vocabulary,), 1, is_head=True),
    ]


class Recorder:
    """What a run's steps worked on; give it to `Medley.run` as `watch`."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        """`jobs` are those of the run."""
        self.steps: list[Step] = []
        self._lengths = [len(job.prompt) for job in jobs]  # of each sequence, virtual tokens left out
        self._begun: set[int] = set()  # have their first token

    def __call__(self, output: StepOutput) -> None:
        """Note a step. A prompt's attention is put into the step that ends it."""
        stats = output.stats
        decoding: list[int] = []
        prompts: list[int] = []
        for tokens in output.tokens:
            index = int(tokens.id)
            length = self._lengths[index] + tokens.virtual_tokens
            (decoding if index in self._begun else prompts).append(length)
            self._begun.add(index)
            self._lengths[index] += len(tokens.token_ids)
        computed = stats.prefill_tokens + stats.decode_tokens + stats.virtual_tokens
        self.steps.append(Step(computed, len(output.tokens), tuple(decoding), tuple(prompts)))


class Limit:
    """The limit for one run's steps. Holds the weights, so that each `measure` is short."""

    def __init__(self, size: BaseSize, steps: Sequence[Step]) -> None:
        """Make and pack the weights."""
        self._size = size
        self._steps = steps
        every = products(size)
        model_bytes = sum(4 * each.width * sum(each.outputs) * each.times for each in every)
        self._products = [(each, _Weights(each, min(model_bytes, _CACHE_BYTES))) for each in every]
        move_to_huge_pages()  # as the engine's weights are

    def measure(self) -> LimitSeconds:
        """Time every product once more; seconds of all steps together."""
        linear = 0.0
        with torch.inference_mode():
            for product, weights in self._products:
                rows = Counter(step.logits if product.is_head else step.tokens for step in self._steps)
                linear += product.times * total(rows, weights.seconds)
            return LimitSeconds(linear, linear + self._size.layers * self._attention())

    def _attention(self) -> float:
        """Seconds of one layer's products over keys and values, all steps together."""
        shape = self._size.heads, self._size.width // self._size.heads
        decoding: Counter[tuple[int, int]] = Counter()  # steps by rows and their mean context
        prompts: Counter[int] = Counter()
        for step in self._steps:
            if step.decoding:
                decoding[len(step.decoding), round(sum(step.decoding) / len(step.decoding))] += 1
            prompts.update(step.prompts)
        seconds = 0.0
        for rows in {rows for rows, _ in decoding}:
            contexts = Counter({context: count for (each, context), count in decoding.items() if each == rows})
            seconds += total(contexts, partial(_decode_seconds, *shape, rows))
        return seconds + total(prompts, partial(_prompt_seconds, *shape))


def total(sizes: Counter[int], seconds: Callable[[int], float]) -> float:
    """Σ count · seconds(size), of sizes above 0.

    `seconds` is called for the sizes themselves while they are few; else for some of them, the smallest and the
    largest among them, and time is linear in between.
    """
    given = sorted(size for size in sizes if size > 0)
    if not given:
        return 0.0
    indices = np.linspace(0, len(given) - 1, min(len(given), _MAX_POINTS)).round().astype(int)
    points = [given[index] for index in indices]
    times = np.interp(given, points, [seconds(point) for point in points])
    return float(sum(sizes[size] * each for size, each in zip(given, times, strict=True)))


class _Weights:
    """Enough copies of one product's weights that each is cold when its turn comes."""

    def __init__(self, product: Product, least_bytes: int) -> None:
        one = 4 * product.width * sum(product.outputs)
        copies = max(2, math.ceil(least_bytes / one))
        joined = _copies((sum(product.outputs), product.width), copies)
        apart = [torch.split(weight, list(product.outputs)) for weight in joined]
        self._width = product.width
        self._ways: list[_Way] = []
        has_packed = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
        for kind in (_plain, _packed) if has_packed else (_plain,):
            self._ways.append(kind(joined))
            if len(product.outputs) > 1:
                self._ways.append(_each(kind, apart))

    def seconds(self, rows: int) -> float:
        """Of one product of `rows` rows, in the fastest way."""
        given = torch.randn(rows, self._width)
        return min(_time(way, given) for way in self._ways)


_Way = list[Callable[[Tensor], object]]  # the product with each copy of the weights


def _plain(weights: Sequence[Tensor]) -> _Way:
    return [partial(functional.linear, weight=weight) for weight in weights]


def _packed(weights: Sequence[Tensor]) -> _Way:
    """oneDNN's own layout, as torch's compiler uses it."""
    mkldnn = torch.ops.mkldnn
    packed = [mkldnn._reorder_linear_weight(weight, _PACK_ROWS) for weight in weights]
    return [partial(_linear_packed, weight=weight) for weight in packed]


def _linear_packed(given: Tensor, weight: Tensor) -> object:
    return torch.ops.mkldnn._linear_pointwise(given, weight, None, "none", [], "")


def _each(way: Callable[[Sequence[Tensor]], _Way], apart: Iterable[Sequence[Tensor]]) -> _Way:
    """One product per module."""
    return [partial(_all, way(weights)) for weights in apart]


def _all(calls: _Way, given: Tensor) -> None:
    for call in calls:
        call(given)


def _decode_seconds(heads: int, head_dim: int, rows: int, context: int) -> float:
    """One layer's attention of `rows` rows that each have one query and `context` keys and values."""
    query = torch.randn(rows, heads, 1, head_dim)
    copies = max(2, math.ceil(_CACHE_BYTES / (8 * rows * heads * context * head_dim)))
    return _attention_seconds(query, (rows, heads, context, head_dim), copies, is_causal=False)


def _prompt_seconds(heads: int, head_dim: int, length: int) -> float:
    """One layer's attention of one prompt."""
    query = torch.randn(1, heads, length, head_dim)
    return _attention_seconds(query, (1, heads, length, head_dim), 2, is_causal=True)


def _attention_seconds(query: Tensor, shape: tuple[int, ...], copies: int, *, is_causal: bool) -> float:
    pairs = list(zip(_copies(shape, copies), _copies(shape, copies), strict=True))
    fused: _Way = [partial(_fused, keys=keys, values=values, is_causal=is_causal) for keys, values in pairs]
    apart: _Way = [partial(_apart, keys=keys, values=values) for keys, values in pairs]
    return min(_time(fused, query), _time(apart, query))


def _fused(query: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> Tensor:
    return functional.scaled_dot_product_attention(query, keys, values, is_causal=is_causal)


def _apart(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return query @ keys.mT @ values


def _copies(shape: tuple[int, ...], count: int) -> list[Tensor]:
    one = torch.randn(shape)
    return [one, *(one.clone() for _ in range(count - 1))]


def _time(way: _Way, given: Tensor) -> float:
    """Median seconds of a call, going round the copies."""
    calls = itertools.cycle(way)
    next(calls)(given)
    seconds: list[float] = []
    while len(seconds) < _LEAST_CALLS or sum(seconds) < _LEAST_SECONDS:
        started = time.perf_counter()
        next(calls)(given)
        seconds.append(time.perf_counter() - started)
    return median(seconds)
