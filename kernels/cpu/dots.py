"""Dot products of weight rows with input rows, in an order that is written down.

A loop in Numba leaves the order of a sum to the compiler, which may add differently for one row and
for seven. Here the order is part of the code, as LLVM vector instructions: lane i of a register
adds the features i, i + 16, i + 32, ..., then the lanes are added by halves. However many products
are computed side by side, each has the same bits, on every processor that has a fused multiply-add;
side by side they share loads, the decoding of weights and the folding of lanes.

4-bit weights are decoded in registers: of every STEP features the even ones first, then the odd
ones, and inputs are laid out the same way. Memory is given by addresses.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils

from specdec.kernels.cpu.jit import intrinsic

LANES = 16
STEP = 2 * LANES  # features per step; the length of an input row is a multiple of it
AHEAD = 4096  # bytes: a pass takes its weights from memory, and hardware reads ahead too little
CHUNK = 2 * STEP  # features whose 4-bit weights share a scale, at the least
# Whether 16 products side by side fit the registers: 32 of LANES floats each.
WIDE = bool(get_host_cpu_features().get("avx512f"))
_FLOAT, _INDEX, _BYTE, _WORD = ir.FloatType(), ir.IntType(64), ir.IntType(8), ir.IntType(32)
_VECTOR, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)
_FLOAT_BYTES = 4


def store_dots(bits: int, weights: int, rows: int) -> Callable[..., None]:
    """The intrinsic for `weights` weight rows and `rows` input rows at a time.

    bits: 4, packed in groups of CHUNK or a multiple of it; 16, bfloat16; 32, float32.
    """

    @intrinsic
    def store(typing, data, stride, scales, biases, group, size, x, pitch, sources, out, width):  # type: ignore[no-untyped-def]
        """out[r, w] = weight w . x[sources[r]] for r < rows, w < weights.

        data: address of the first weight row, `stride` bytes apart; scales, biases: of its first
        group of `group` features; x: of input rows `pitch` bytes apart; sources: of int64 [rows];
        out: of float32, rows `width` bytes apart. size: features, a multiple of STEP.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            data, stride, scales, biases, group, size, x, pitch, sources, out, width = args
            build = _Builder(builder)
            inputs = []
            for r in range(rows):
                source = build.load(_INDEX, build.offset(sources, 8 * r))
                inputs.append(builder.add(x, builder.mul(source, pitch)))
            starts = [builder.add(data, builder.mul(stride, _INDEX(w))) for w in range(weights)]
            if bits == 4:
                groups = builder.mul(builder.sdiv(size, group), _INDEX(_FLOAT_BYTES))
                first, second = (
                    [builder.add(base, builder.mul(groups, _INDEX(w))) for w in range(weights)]
                    for base in (scales, biases)
                )
                sums = build.packed(size, group, starts, first, second, inputs)
            else:
                sums = build.plain(size, starts, inputs, bits)
            build.store(build.fold(sums), weights, rows, out, width)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return store


class _Builder:
    """Emits the parts of a block of products."""

    def __init__(self, builder: Any) -> None:
        self.ir = builder
        self.module = builder.module

    def offset(self, address: Any, count: int) -> Any:
        return self.ir.add(address, _INDEX(count)) if count else address

    def prefetch(self, address: Any) -> None:
        """Have the line AHEAD of an address fetched; it may lie behind the weights' end."""
        byte = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
        fetch = cgutils.get_or_insert_function(self.module, kind, "llvm.prefetch.p0i8")
        place = self.ir.inttoptr(self.ir.add(address, _INDEX(AHEAD)), byte)
        self.ir.call(fetch, [place, _WORD(0), _WORD(3), _WORD(1)])  # to read, into all caches

    def load(self, kind: Any, address: Any) -> Any:
        value = self.ir.load(self.ir.inttoptr(address, kind.as_pointer()))
        value.align = 1
        return value

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        function = cgutils.get_or_insert_function(self.module, kind, f"llvm.fma.v{LANES}f32")
        return self.ir.call(function, [a, b, c])

    def spread(self, value: Any) -> Any:
        """A vector of one value."""
        vector = self.ir.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _WORD(0))
        zeros = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
        return self.ir.shuffle_vector(vector, ir.Constant(_VECTOR, ir.Undefined), zeros)

    def loop(self, size: Any, step: int, count: int, body: Callable[..., list[Any]]) -> list[Any]:
        """`count` sums, from zero, over the features in steps: body(feature, sums) adds to them."""
        b = self.ir
        before = b.block
        loop, after = b.append_basic_block("dots"), b.append_basic_block("dots.end")
        b.branch(loop)
        b.position_at_end(loop)
        feature = b.phi(_INDEX)
        feature.add_incoming(_INDEX(0), before)
        sums = [b.phi(_VECTOR) for _ in range(count)]
        added = body(feature, sums)
        following = b.add(feature, _INDEX(step))
        feature.add_incoming(following, b.block)
        for phi, total in zip(sums, added, strict=True):
            phi.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
            phi.add_incoming(total, b.block)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        return added

    def plain(self, size: Any, weights: list[Any], inputs: list[Any], bits: int) -> list[Any]:
        def body(feature: Any, sums: list[Any]) -> list[Any]:
            at = self.ir.mul(feature, _INDEX(_FLOAT_BYTES))
            for base in weights if bits == 16 else []:  # float32: keys, or just decoded
                self.prefetch(self.ir.add(base, self.ir.mul(feature, _INDEX(2))))
            for half in range(2):
                if bits == 16:
                    factors = [self._bfloat16(base, feature, half) for base in weights]
                else:
                    factors = [self._vector(base, at, half) for base in weights]
                sums = self._add(sums, factors, inputs, at, half)
            return sums

        return self.loop(size, STEP, len(weights) * len(inputs), body)

    def packed(
        self,
        size: Any,
        group: Any,
        weights: list[Any],
        scales: list[Any],
        biases: list[Any],
        inputs: list[Any],
    ) -> list[Any]:
        def body(feature: Any, sums: list[Any]) -> list[Any]:
            b = self.ir
            of_group = b.mul(b.sdiv(feature, group), _INDEX(_FLOAT_BYTES))
            at = b.mul(feature, _INDEX(_FLOAT_BYTES))
            decoders = [
                self._decoder(b.add(scale, of_group), b.add(bias, of_group))
                for scale, bias in zip(scales, biases, strict=True)
            ]
            for step in range(CHUNK // STEP):
                codes = []
                for base in weights:
                    place = b.add(base, b.lshr(feature, _INDEX(1)))
                    if step == 0:
                        self.prefetch(place)
                    packed = self.load(
                        ir.VectorType(_BYTE, LANES), self.offset(place, step * LANES)
                    )
                    codes.append(b.zext(packed, _WORDS))
                for half in range(2):
                    factors = [
                        decode(code, 4 * half) for decode, code in zip(decoders, codes, strict=True)
                    ]
                    sums = self._add(sums, factors, inputs, at, 2 * step + half)
            return sums

        return self.loop(size, CHUNK, len(weights) * len(inputs), body)

    def _decoder(self, scale: Any, bias: Any) -> Callable[[Any, int], Any]:
        """Codes to weights, of one group: from the low four bits above `shift`."""
        b = self.ir
        scale, bias = (self.spread(self.load(_FLOAT, place)) for place in (scale, bias))
        nibble = ir.Constant(_WORDS, [15] * LANES)

        def low(codes: Any, shift: int) -> Any:
            return b.lshr(codes, ir.Constant(_WORDS, [shift] * LANES)) if shift else codes

        if WIDE:
            # All 16 weights of a group in one register; the instruction takes four bits of a lane.
            every = ir.Constant(_VECTOR, [float(code) for code in range(16)])
            table = self.fma(every, scale, bias)
            kind = ir.FunctionType(_VECTOR, [_VECTOR, _WORDS])
            name = "llvm.x86.avx512.permvar.sf.512"
            look_up = cgutils.get_or_insert_function(self.module, kind, name)
            return lambda codes, shift: b.call(look_up, [table, low(codes, shift)])
        return lambda codes, shift: self.fma(
            b.uitofp(b.and_(low(codes, shift), nibble), _VECTOR), scale, bias
        )

    def _add(
        self, sums: list[Any], factors: list[Any], inputs: list[Any], at: Any, half: int
    ) -> list[Any]:
        """The sums, input by input, plus one vector of products each."""
        added: list[Any] = []
        for base in inputs:
            values = self._vector(base, at, half)
            added += [
                self.fma(factor, values, sums[len(added) + w]) for w, factor in enumerate(factors)
            ]
        return added

    def _bfloat16(self, base: Any, feature: Any, half: int) -> Any:
        b = self.ir
        place = self.offset(b.add(base, b.mul(feature, _INDEX(2))), half * LANES * 2)
        bits = b.zext(self.load(ir.VectorType(ir.IntType(16), LANES), place), _WORDS)
        return b.bitcast(b.shl(bits, ir.Constant(_WORDS, [16] * LANES)), _VECTOR)

    def _vector(self, base: Any, at: Any, half: int) -> Any:
        place = self.ir.add(base, at)
        return self.load(_VECTOR, self.offset(place, half * LANES * _FLOAT_BYTES))

    def fold(self, vectors: list[Any]) -> Any:
        """Add each vector's lanes by halves: one vector of a sum per product.

        Products are folded together in shared registers; each one's additions are the same.
        """
        vectors = list(vectors)
        while len(vectors) & (len(vectors) - 1):
            vectors.append(vectors[-1])  # to a power of two; nobody looks at the copies
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            paired = len(vectors) > 1
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if paired else [vectors * 2]
            starts = range(0, vectors[0].type.count * (1 + paired), 2 * lanes)
            low = [start + i for start in starts for i in range(lanes)]
            vectors = [
                self.ir.fadd(
                    self._pick(first, second, low),
                    self._pick(first, second, [i + lanes for i in low]),
                )
                for first, second in pairs
            ]
        return vectors

    def _pick(self, first: Any, second: Any, lanes: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(_WORD, len(lanes)), lanes)
        return self.ir.shuffle_vector(first, second, mask)

    def store(self, totals: list[Any], weights: int, rows: int, out: Any, width: Any) -> None:
        """Write sums, `weights` for each row, given in vectors one after the other."""
        per = totals[0].type.count
        for r in range(rows):
            place = self.ir.add(out, self.ir.mul(width, _INDEX(r)))
            start = r * weights
            vector = totals[start // per]
            if weights == 1:
                value = self.ir.extract_element(vector, _WORD(start % per))
            else:
                lanes = [start % per + w for w in range(weights)]
                value = self._pick(vector, vector, lanes)
            stored = self.ir.store(value, self.ir.inttoptr(place, value.type.as_pointer()))
            stored.align = _FLOAT_BYTES
