"""Tiles: the products of a few tokens with a block of packed weights, their sums in registers. The inner loop of all
matrix products by `server.model.program_kernels`.

    for input in inputs: outputs[token, :] += x[token, input] · weight[input, :]

with up to `TILE_TOKENS` tokens and the `BLOCK` outputs whose weights lie side by side. Sums run over the inputs in
their order whatever the number of tokens, so a token's product is the same, to the bit, in every company. While it
multiplies, a tile asks for memory that is needed later (Goto and van de Geijn 2008 describe the scheme).

Written in LLVM's language, for no compiler of loops keeps 24 sums in registers by itself.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from server.model.compiled import prefetched
from server.model.vectors import FLOAT, INT, LANES, NUMBER_BYTES, VECTOR, load, multiply_add, splat, store

BLOCK = 64  # outputs whose weights lie side by side: [inputs, BLOCK], as oneDNN packs them
UNROLLED = 4  # inputs are taken so many at a time
HAS_WIDE_REGISTERS = bool(binding.get_host_cpu_features().get("avx512f"))
TILE_TOKENS = 6 if HAS_WIDE_REGISTERS else 1
"""Tokens at most. Of AVX-512's 32 registers sums take 24, weights 4, an input 1."""
LINES = (0, 2, 4, 8, 16)
"""How many cache lines a tile may ask for with each `UNROLLED` inputs. Of a block of weights these are 16."""

_VECTORS = BLOCK // LANES
_LINE = NUMBER_BYTES * LANES  # bytes of a vector
_ARGUMENTS = ("inputs", "input_stride", "weight", "count", "outputs", "output_stride", "ahead")


@intrinsic  # type: ignore[untyped-decorator]
def multiply_tile(
    typing_context: Any,
    tokens: Any,
    lines: Any,
    inputs: Any,
    input_stride: Any,
    weight: Any,
    count: Any,
    outputs: Any,
    output_stride: Any,
    ahead: Any,
) -> Any:
    """Add the products of `tokens` tokens to their outputs. `inputs`, `weight` and `outputs` are addresses, strides
    bytes from token to token, `count` the number of inputs, above 0 and a multiple of `UNROLLED`; `lines` is one of
    `LINES`, asked for from the address `ahead` on."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        given_tokens, given_lines, *others = arguments
        done = builder.append_basic_block("done")
        choice = builder.switch(builder.add(builder.mul(given_tokens, INT(LINES[-1] + 1)), given_lines), done)
        for number in range(1, TILE_TOKENS + 1):
            for asked in LINES:
                block = builder.append_basic_block(f"tile {number} {asked}")
                choice.add_case(INT(number * (LINES[-1] + 1) + asked), block)
                with builder.goto_block(block):
                    builder.call(_tile(builder.module, number, asked), others)
                    builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*[types.int64] * (2 + len(_ARGUMENTS))), generate


def _tile(module: ir.Module, tokens: int, lines: int) -> ir.Function:
    """The function for so many tokens and lines."""
    name = f"medley_tile_{tokens}_{lines}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INT] * len(_ARGUMENTS)), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    inputs, input_stride, weight, count, outputs, output_stride, ahead = function.args
    entry, loop, end = (function.append_basic_block(label) for label in ("entry", "loop", "end"))

    builder = ir.IRBuilder(entry)
    rows = [builder.add(outputs, builder.mul(output_stride, INT(token))) for token in range(tokens)]
    before = [load(builder, builder.add(row, INT(_LINE * at)), VECTOR) for row in rows for at in range(_VECTORS)]
    columns = [builder.add(inputs, builder.mul(input_stride, INT(token))) for token in range(tokens)]
    builder.branch(loop)

    builder.position_at_end(loop)
    at = builder.phi(INT)
    at.add_incoming(INT(0), entry)
    carried = [builder.phi(VECTOR) for _ in before]
    sums: list[Any] = list(carried)
    for step in range(UNROLLED):
        place = builder.add(weight, builder.mul(builder.add(at, INT(step)), INT(NUMBER_BYTES * BLOCK)))
        weights = [load(builder, builder.add(place, INT(_LINE * each)), VECTOR) for each in range(_VECTORS)]
        for token, column in enumerate(columns):
            offset = builder.mul(builder.add(at, INT(step)), INT(NUMBER_BYTES))
            factor = splat(builder, load(builder, builder.add(column, offset), FLOAT))
            for each in range(_VECTORS):
                place_of_sum = token * _VECTORS + each
                sums[place_of_sum] = multiply_add(builder, factor, weights[each], sums[place_of_sum])
        for line in range(step * lines // UNROLLED, (step + 1) * lines // UNROLLED):
            passed = builder.mul(at, INT(_LINE * lines // UNROLLED))
            prefetched(builder, builder.add(builder.add(ahead, passed), INT(_LINE * line)))
    following = builder.add(at, INT(UNROLLED))
    at.add_incoming(following, loop)
    for phi, first, last in zip(carried, before, sums, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(last, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)

    builder.position_at_end(end)
    for token, row in enumerate(rows):
        for each in range(_VECTORS):
            store(builder, sums[token * _VECTORS + each], builder.add(row, INT(_LINE * each)))
    builder.ret_void()
    return function
