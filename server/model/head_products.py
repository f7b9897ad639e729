"""The two products of attention for one head and the tokens of a page, their sums in registers. The inner loops of
`server.model.decode_kernel`.

    scores[token] = query · keys[token, :]        output[:] += Σ weights[token] · values[token, :]

While it multiplies, each asks for what lies as far from `ahead` as what it reads lies from the first key or value.

Written in LLVM's language, as `server.model.tiles` are: of loops over as many numbers as a head has, a compiler makes
more of entering and leaving them than of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from server.model.compiled import prefetched
from server.model.vectors import FLOAT, INT, LANES, NUMBER_BYTES, VECTOR, load, multiply_add, splat, store

_TOKENS = 4  # whose scores are summed at once
_VECTORS = 4  # of an output, that are summed at once


@intrinsic  # type: ignore[untyped-decorator]
def score_tokens(
    typing_context: Any,
    query: Any,
    keys: Any,
    stride: Any,
    tokens: Any,
    width: Any,
    scores: Any,
    ahead: Any,
) -> Any:
    """`scores[token]` = query · keys[token] for so many tokens. `query`, `keys`, `scores` and `ahead` are addresses,
    `stride` bytes from token to token, `width` the numbers of a head."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        builder.call(_function(builder.module, "medley_score_tokens", arguments, _score_tokens), arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_tokens(
    typing_context: Any,
    output: Any,
    values: Any,
    stride: Any,
    tokens: Any,
    width: Any,
    weights: Any,
    ahead: Any,
) -> Any:
    """output += Σ `weights[token]` · values[token]; arguments as of `score_tokens`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        builder.call(_function(builder.module, "medley_add_tokens", arguments, _add_tokens), arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


def _function(module: ir.Module, name: str, arguments: Sequence[Any], write: Callable[..., None]) -> ir.Function:
    """The module's function of this name, written by `write`."""
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INT] * len(arguments)), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    write(builder, *function.args)
    builder.ret_void()
    return function


def _score_tokens(
    b: ir.IRBuilder, query: Any, keys: Any, stride: Any, tokens: Any, width: Any, scores: Any, ahead: Any
) -> None:
    whole = b.and_(width, INT(-LANES))
    reduced = ir.FunctionType(FLOAT, [FLOAT, VECTOR])
    reduce = get_or_insert_function(b.module, reduced, f"llvm.vector.reduce.fadd.v{LANES}f32")

    def score(count: int) -> Callable[[Any, Sequence[Any]], Sequence[Any]]:
        """So many tokens from the given one on."""

        def body(first: Any, _: Sequence[Any]) -> Sequence[Any]:
            offsets = [b.mul(b.add(first, INT(each)), stride) for each in range(count)]
            rows = [b.add(keys, offset) for offset in offsets]
            coming = [b.add(ahead, offset) for offset in offsets]

            def products(kind: Any) -> Callable[[Any, Sequence[Any]], Sequence[Any]]:
                def multiply(at: Any, sums: Sequence[Any]) -> Sequence[Any]:
                    number = load(b, _place(b, query, at), kind)
                    if kind is VECTOR:
                        for line in coming:
                            prefetched(b, _place(b, line, at))
                    return [
                        multiply_add(b, number, load(b, _place(b, row, at), kind), total)
                        for row, total in zip(rows, sums, strict=True)
                    ]

                return multiply

            zeros = [ir.Constant(VECTOR, [0.0] * LANES)] * count
            sums = _loop(b, INT(0), whole, LANES, zeros, products(VECTOR))
            totals = [b.call(reduce, [FLOAT(0.0), each], fastmath=("reassoc",)) for each in sums]
            for each, total in enumerate(_loop(b, whole, width, 1, totals, products(FLOAT))):
                store(b, total, _place(b, scores, b.add(first, INT(each))))
            return []

        return body

    many = b.and_(tokens, INT(-_TOKENS))
    _loop(b, INT(0), many, _TOKENS, [], score(_TOKENS))
    _loop(b, many, tokens, 1, [], score(1))


def _add_tokens(
    b: ir.IRBuilder, output: Any, values: Any, stride: Any, tokens: Any, width: Any, weights: Any, ahead: Any
) -> None:
    def add(count: int, kind: Any) -> Callable[[Any, Sequence[Any]], Sequence[Any]]:
        """So many vectors, or numbers, of the output from the given place on."""
        places = range(0, count * LANES, LANES)

        def body(first: Any, _: Sequence[Any]) -> Sequence[Any]:
            at = [b.add(first, INT(place)) for place in places]

            def products(token: Any, sums: Sequence[Any]) -> Sequence[Any]:
                weight = load(b, _place(b, weights, token), FLOAT)
                factor = splat(b, weight) if kind is VECTOR else weight
                offset = b.mul(token, stride)
                row, coming = b.add(values, offset), b.add(ahead, offset)
                if kind is VECTOR:
                    for place in at:
                        prefetched(b, _place(b, coming, place))
                return [
                    multiply_add(b, factor, load(b, _place(b, row, place), kind), total)
                    for place, total in zip(at, sums, strict=True)
                ]

            before = [load(b, _place(b, output, place), kind) for place in at]
            for place, total in zip(at, _loop(b, INT(0), tokens, 1, before, products), strict=True):
                store(b, total, _place(b, output, place))
            return []

        return body

    many, whole = b.and_(width, INT(-LANES * _VECTORS)), b.and_(width, INT(-LANES))
    _loop(b, INT(0), many, LANES * _VECTORS, [], add(_VECTORS, VECTOR))
    _loop(b, many, whole, LANES, [], add(1, VECTOR))
    _loop(b, whole, width, 1, [], add(1, FLOAT))


def _loop(
    b: ir.IRBuilder,
    start: Any,
    stop: Any,
    step: int,
    initial: Sequence[Any],
    body: Callable[[Any, Sequence[Any]], Sequence[Any]],
) -> list[Any]:
    """What `body` makes of `initial`, called with each place from `start` to `stop` and what it made before."""
    before = b.block
    loop, done = b.append_basic_block(), b.append_basic_block()
    b.cbranch(b.icmp_signed("<", start, stop), loop, done)
    b.position_at_end(loop)
    at, *carried = (b.phi(value.type) for value in (start, *initial))
    made = body(at, carried)
    following = b.add(at, INT(step))
    end = b.block
    b.cbranch(b.icmp_signed("<", following, stop), loop, done)
    for phi, first, last in zip((at, *carried), (start, *initial), (following, *made), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, end)
    b.position_at_end(done)
    results = [b.phi(value.type) for value in initial]
    for phi, first, last in zip(results, initial, made, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, end)
    return results


def _place(b: ir.IRBuilder, address: Any, at: Any) -> Any:
    """The address of a number of several."""
    return b.add(address, b.mul(at, INT(NUMBER_BYTES)))
