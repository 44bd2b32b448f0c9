"""exp for float32 that compilers can put into vector lanes, and what is made of it.

Explicit fused multiply-adds: a value has the same bits in a vector and alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from specdec.kernels.cpu.jit import intrinsic, jit

_FLOAT, _WORD = ir.FloatType(), ir.IntType(32)
_ONE = np.float32(1)
_LOWEST, _HIGHEST = -87.0, 88.0  # of the argument: 2^-126 to 2^127
_LN2_HIGH = 0.693359375  # few bits: its multiples by small integers are exact
# exp(r) = 1 + r + r^2 P(r) for |r| <= ln(2) / 2 (Cephes, expf)
_P = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


@intrinsic
def exp(typing, x):  # type: ignore[no-untyped-def]
    """e^x to 2 units in the last place; 0 below -87, e^88 above 88, NaN of NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        module, (x,) = builder.module, args

        def call(name: str, *values: Any) -> Any:
            kind = ir.FunctionType(_FLOAT, [_FLOAT] * len(values))
            return builder.call(cgutils.get_or_insert_function(module, kind, name), values)

        def fma(a: Any, b: Any, c: Any) -> Any:
            return call("llvm.fma.f32", a, b, c)

        below = builder.fcmp_ordered("<", x, _FLOAT(_LOWEST))
        above = builder.fcmp_ordered(">", x, _FLOAT(_HIGHEST))
        x = builder.select(below, _FLOAT(_LOWEST), builder.select(above, _FLOAT(_HIGHEST), x))
        turns = call("llvm.rint.f32", builder.fmul(x, _FLOAT(1 / math.log(2))))
        rest = fma(turns, _FLOAT(-_LN2_HIGH), x)
        rest = fma(turns, _FLOAT(_LN2_HIGH - math.log(2)), rest)
        total = _FLOAT(_P[0])
        for factor in _P[1:]:
            total = fma(total, rest, _FLOAT(factor))
        total = fma(fma(total, rest, _FLOAT(1.0)), rest, _FLOAT(1.0))
        number = builder.fcmp_ordered("ord", x, x)  # an integer of NaN is anything
        power = builder.fptosi(builder.select(number, turns, _FLOAT(0.0)), _WORD)
        power = builder.shl(builder.add(power, _WORD(127)), _WORD(23))
        result = builder.fmul(total, builder.bitcast(power, _FLOAT))
        return builder.select(below, _FLOAT(0.0), result)

    return types.float32(types.float32), generate


@intrinsic
def fma(typing, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        kind = ir.FunctionType(_FLOAT, [_FLOAT] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32")
        return builder.call(function, args)

    return types.float32(*[types.float32] * 3), generate


@jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    return _ONE / (_ONE + exp(-x))


@jit
def silu(x):  # type: ignore[no-untyped-def]
    return x / (_ONE + exp(-x))
