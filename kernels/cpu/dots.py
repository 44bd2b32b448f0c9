"""Dot products of decoded weight rows with input rows, in an order that is written down.

A loop in Numba leaves the order of a sum to the compiler, which may add differently for one row and
for four. Here the order is part of the code, as LLVM vector instructions: lane i of two registers
adds the features i, i + 32, i + 64, ... (and 16 further), the registers are added, then the lanes
by halves. However many products are computed side by side, each has the same bits, on every
processor that has a fused multiply-add; side by side they share loads and the folding of lanes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

LANES = 16
STEP = 2 * LANES  # features per step; the length of a row is a multiple of it
# Whether 16 products side by side fit the registers: 32 of LANES floats each.
WIDE = bool(get_host_cpu_features().get("avx512f"))
_FLOAT, _INDEX = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_FLOAT_BYTES = 4


def _store_dots(weights: int, rows: int) -> Callable[..., None]:
    """The intrinsic for `weights` weight rows and `rows` input rows at a time.

    Their product is a power of two up to LANES.
    """

    @intrinsic
    def store_dots(typing, values, x, sources, first, out, feature):  # type: ignore[no-untyped-def]
        """out[first + r, feature + w] = values[w] . x[sources[first + r]], r < rows, w < weights.

        values float32 [weights or more, size] and x float32 [n, size], rows laid out contiguously;
        sources int64.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            values, x, sources, out = [
                make_array(kind)(context, builder, value)
                for kind, value in zip(signature.args, args, strict=True)
                if isinstance(kind, types.Array)
            ]
            at = [builder.add(args[3], _INDEX(r)) for r in range(rows)]
            inputs = [_row(builder, x, builder.load(builder.gep(sources.data, [i]))) for i in at]
            rows_of_values = [_row(builder, values, _INDEX(w)) for w in range(weights)]
            size = builder.extract_value(values.shape, 1)
            totals = _fold(builder, _accumulate(builder, size, rows_of_values, inputs))
            for r, i in enumerate(at):
                row = _row(builder, out, i)
                for w in range(weights):
                    place = builder.add(args[5], _INDEX(w))
                    cell = builder.add(row, builder.mul(place, _INDEX(_FLOAT_BYTES)))
                    lane = ir.IntType(32)(r * weights + w)
                    total = builder.extract_element(totals, lane) if weights * rows > 1 else totals
                    builder.store(total, builder.inttoptr(cell, _FLOAT.as_pointer()))
            return context.get_dummy_value()

        return types.void(values, x, sources, first, out, feature), generate

    return store_dots


def _row(builder: Any, array: Any, index: Any) -> Any:
    """Address of a row of a matrix."""
    start = builder.ptrtoint(array.data, _INDEX)
    return builder.add(start, builder.mul(index, builder.extract_value(array.strides, 0)))


def _accumulate(
    builder: Any, size: Any, weights: Sequence[Any], inputs: Sequence[Any]
) -> list[Any]:
    """One vector of partial sums per input and weight row: the loop over the features."""
    before = builder.block
    loop, after = builder.append_basic_block("dots"), builder.append_basic_block("dots.end")
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
    )
    builder.branch(loop)
    builder.position_at_end(loop)
    feature = builder.phi(_INDEX)
    feature.add_incoming(_INDEX(0), before)
    sums = [builder.phi(_VECTOR) for _ in range(2 * len(weights) * len(inputs))]
    offset = builder.mul(feature, _INDEX(_FLOAT_BYTES))

    def load(base: Any, half: int) -> Any:
        address = builder.add(builder.add(base, offset), _INDEX(half * LANES * _FLOAT_BYTES))
        vector = builder.load(builder.inttoptr(address, _VECTOR.as_pointer()))
        vector.align = _FLOAT_BYTES
        return vector

    factors = [[load(base, half) for half in range(2)] for base in weights]
    added: list[Any] = []
    for base in inputs:
        values = [load(base, half) for half in range(2)]
        for pair in factors:
            for half in range(2):
                total = sums[len(added)]
                added.append(builder.call(fma, [pair[half], values[half], total]))
    following = builder.add(feature, _INDEX(STEP))
    feature.add_incoming(following, loop)
    for phi, total in zip(sums, added, strict=True):
        phi.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
        phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, size), loop, after)
    builder.position_at_end(after)
    return [builder.fadd(*added[i : i + 2]) for i in range(0, len(added), 2)]


def _fold(builder: Any, vectors: list[Any]) -> Any:
    """Add each vector's lanes by halves: a vector of one sum per product, or the sum itself.

    Several products are folded together in shared registers; each one's additions are the same.
    """
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        paired = len(vectors) > 1
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if paired else [vectors * 2]
        starts = range(0, vectors[0].type.count * (1 + paired), 2 * lanes)
        low = [start + i for start in starts for i in range(lanes)]
        vectors = [
            builder.fadd(
                _pick(builder, first, second, low),
                _pick(builder, first, second, [i + lanes for i in low]),
            )
            for first, second in pairs
        ]
    if vectors[0].type.count > 1:
        return vectors[0]
    return builder.extract_element(vectors[0], ir.IntType(32)(0))


def _pick(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(first, second, mask)


# store_WEIGHTSxROWS
store_1x1, store_1x2, store_1x4 = (_store_dots(1, rows) for rows in (1, 2, 4))
store_4x1, store_4x2 = (_store_dots(4, rows) for rows in (1, 2))
