"""The cases: every operation with a GPU kernel, at the real geometry and at odd small sizes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from scripts.gpu import inputs
from scripts.gpu.case import Case, Outputs, by_rows
from scripts.gpu.geometry import TINY, Geometry
from scripts.gpu.inputs import wide
from scripts.gpu.rounds import round_cases
from scripts.gpu.samples import cases as sample_cases
from scripts.gpu.trees import attention_cases, mix_cases, replay_cases
from specdec.kernels.array import to_numpy
from specdec.kernels.attention_inputs import AttentionShape, attention_inputs
from specdec.kernels.experts import combine, experts_apart, feed_forward, shared_hidden
from specdec.kernels.linear import Piece, embed, linear
from specdec.kernels.routing import Routing, route

DTYPES = (mx.float32, mx.bfloat16)
PACKINGS = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
# of odd widths: nothing is a multiple of what a threadgroup likes
ODD = replace(
    TINY,
    hidden_size=192,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=64,
    num_experts=13,
    num_experts_per_tok=3,
    moe_intermediate_size=64,
    linear_num_key_heads=3,
    linear_num_value_heads=6,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
)


def linear_case(
    dtype: mx.Dtype,
    rows: int,
    out: int,
    into: int,
    packing: tuple[int, int],
    normed: bool,
    added: bool,
    real: bool = False,
) -> Case:
    bits, group = packing
    weight = inputs.weight(dtype, out, into, bits=bits, group=group)
    norm = inputs.norm(dtype, into) if normed else None
    x, residual = inputs.normal(dtype, rows, into), inputs.normal(dtype, rows, out)

    def call(x: mx.array, residual: mx.array) -> Outputs:
        return [linear(x, weight, norm, residual if added else None)]

    def reference() -> Outputs:
        wider = [wide(value) for value in (x, weight, norm, residual if added else None)]
        return [linear(*wider)]

    run, companies = by_rows(call, [x, residual], rows)
    words = f"{rows} x {out}x{into} {f'{bits}b g{group}' if bits else 'dense'}"
    words += " norm" * normed + " residual" * added
    return Case("linear", words, dtype, run, reference, companies, real)


def linear_cases(bits: int, tiny: bool) -> Iterator[Callable[[], Case]]:
    """Of one number of bits, 0 for dense."""
    odd = (77, 384)
    for packing in [p for p in PACKINGS if p[0] == bits] or [(0, 0)]:
        for dtype in (*DTYPES, mx.float16) if packing[1] in (0, 64) else DTYPES:
            yield lambda d=dtype, p=packing: linear_case(d, 7, *odd, p, True, False)  # type: ignore[misc]
        yield lambda p=packing: linear_case(mx.bfloat16, 3, *odd, p, False, True)  # type: ignore[misc]
    if tiny:
        return
    shapes = {
        4: [(12352, 2048, True, False), (9216, 2048, True, False), (2048, 4096, False, True)],
        8: [(257, 2048, True, False)],
    }
    for shape in shapes.get(bits, []):
        for dtype in DTYPES:
            for rows in (7, 16, 32) if dtype == mx.bfloat16 else (7,):
                yield lambda s=shape, d=dtype, r=rows: linear_case(  # type: ignore[misc]
                    d, r, s[0], s[1], (bits, 64), s[2], s[3], True
                )
    if bits in (0, 4, 8):  # large enough for matrix units, of no whole tiles
        for packing in [p for p in PACKINGS if p[0] == bits] or [(0, 0)]:
            for rows in (1, 7, 32):
                yield lambda p=packing, r=rows: linear_case(  # type: ignore[misc]
                    mx.bfloat16, r, 4101, 1024, p, True, True
                )
    if bits == 4:
        yield lambda: linear_case(mx.bfloat16, 7, 248320, 2048, (4, 64), True, False, True)


def embed_cases(g: Geometry) -> Iterator[Callable[[], Case]]:
    def case(dtype: mx.Dtype, packing: tuple[int, int]) -> Case:
        vocab = min(g.vocab_size, 4099)
        weight = inputs.weight(dtype, vocab, g.hidden_size, bits=packing[0], group=packing[1])
        ids = np.random.default_rng(0).integers(0, vocab, 7).astype(np.int32)
        companies = [
            ([r], partial(lambda one: [embed(one, weight)], ids[r : r + 1])) for r in (0, 6)
        ]
        return Case(
            "embed",
            f"7 of {vocab}x{g.hidden_size} {packing[0]}b",
            dtype,
            lambda: [embed(ids, weight)],
            lambda: [wide(weight).data[mx.array(ids)]],
            companies,
        )

    for dtype in DTYPES:
        for packing in ((4, 64), (8, 32), (0, 0)):
            yield lambda d=dtype, p=packing: case(d, p)  # type: ignore[misc]


def route_cases(g: Geometry) -> Iterator[Callable[[], Case]]:
    def case(dtype: mx.Dtype, rows: int, normalize: bool) -> Case:
        experts, top_k = g.num_experts, g.num_experts_per_tok
        logits = inputs.normal(dtype, rows, experts + 1, scale=2)

        def call(rows: mx.array) -> Outputs:
            found = route(Piece(rows, 0, experts), top_k, normalize)
            return [found.experts.astype(mx.float32), found.weights]

        run, companies = by_rows(call, [logits], rows)
        words = f"{rows} x top {top_k} of {experts}"
        return Case("route", words, mx.float32, run, lambda: call(wide(logits)), companies)

    for rows in (1, 7, 32):
        yield lambda r=rows: case(mx.bfloat16, r, True)  # type: ignore[misc]
    yield lambda: case(mx.float32, 9, False)


def expert_cases(g: Geometry, op: str, dtype: mx.Dtype, real: bool) -> Iterator[Callable[[], Case]]:
    """feed_forward, or the same by experts_apart in two waves, shared_hidden and combine."""

    def case(dtype: mx.Dtype, rows: int, packing: tuple[int, int], shared: bool) -> Case:
        count = min(g.num_experts, 64)
        bank = inputs.bank(dtype, g, count, *packing)
        norm, x = inputs.norm(dtype, g.hidden_size), inputs.normal(dtype, rows, g.hidden_size)
        own = inputs.shared_expert(dtype, g) if shared else None
        logits = inputs.normal(dtype, rows, count + 1, scale=2)
        slots = np.random.default_rng(0).permutation(count).astype(np.int32)
        table = mx.array(slots)
        waves = [mx.array(np.where(slots % 2 == n, slots, -1).astype(np.int32)) for n in (0, 1)]

        def routed(x: mx.array, logits: mx.array) -> tuple[Routing, Piece | None]:
            found = route(Piece(logits, 0, count), g.num_experts_per_tok, True, x, norm)
            return found, Piece(logits, count, 1) if shared else None

        def whole(x: mx.array, logits: mx.array) -> Outputs:
            found, gate = routed(x, logits)
            return [feed_forward(x, norm, bank, found, table, own, gate)]

        def apart(x: mx.array, logits: mx.array) -> Outputs:
            found, gate = routed(x, logits)
            chosen = to_numpy(found.experts)
            parts = [
                experts_apart(x, norm, bank, found, wave)
                for wave in waves
                if (to_numpy(wave)[chosen] >= 0).any()
            ]
            hidden = None if own is None else shared_hidden(x, norm, own)
            return [combine(x, sum(parts[1:], parts[0]), found, own, hidden, gate)]

        def reference() -> Outputs:
            wider = wide(x), wide(norm), wide(bank)
            found, gate = routed(wide(x), wide(logits))
            return [feed_forward(*wider, found, table, wide(own), gate)]

        run, companies = by_rows(whole if op == "feed_forward" else apart, [x, logits], rows)
        if op != "feed_forward":
            companies.append((list(range(rows)), lambda: whole(x, logits)))
        words = f"{rows} x {g.hidden_size}x{g.moe_intermediate_size} top {g.num_experts_per_tok}"
        words += f" {packing[0]}b g{packing[1]}" + " shared" * shared
        return Case(op, words, dtype, run, reference, companies, real)

    for rows in (1, 7, 16) if real else (7,):
        yield lambda r=rows: case(dtype, r, (4, 64), True)  # type: ignore[misc]
    if dtype == mx.float32:
        return
    if not real:
        for packing in ((8, 32), (6, 64), (3, 32)):
            yield lambda p=packing: case(mx.bfloat16, 5, p, False)  # type: ignore[misc]
    elif op == "feed_forward":
        yield lambda: case(mx.bfloat16, 32, (4, 64), True)


def attention_input_cases(g: Geometry, real: bool) -> Iterator[Callable[[], Case]]:
    def case(dtype: mx.Dtype, rows: int) -> Case:
        shape = inputs.attention_shape(dtype, g)
        pieces = inputs.attention_pieces(dtype, g, rows)
        cos, sin = inputs.turns(g, np.arange(rows) * 37 + 1000)

        def call(
            fused: mx.array, cos: mx.array, sin: mx.array, shape: AttentionShape = shape
        ) -> Outputs:
            q, k, v = (Piece(fused, piece.start, piece.width) for piece in pieces)
            return [y.swapaxes(0, 1) for y in attention_inputs(q, k, v, shape, cos, sin)]

        run, companies = by_rows(call, [pieces[0].rows, cos, sin], rows)
        words = f"{rows} x {g.num_attention_heads}/{g.num_key_value_heads} heads of {g.head_dim}"

        def reference() -> Outputs:
            return call(wide(pieces[0].rows), cos, sin, wide(shape))

        return Case("attention_inputs", words, dtype, run, reference, companies, real)

    for dtype in DTYPES:
        for rows in (1, 7, 32):
            yield lambda d=dtype, r=rows: case(d, r)  # type: ignore[misc]


def groups(g: Geometry, tiny: bool) -> dict[str, Callable[[], Iterator[Callable[[], Case]]]]:
    """By name, what one process checks: makers of cases, made one at a time."""
    sizes = [(ODD, False)] if tiny else [(g, True), (ODD, False)]

    def each(make: Callable[..., Iterator[Callable[[], Case]]], *more: str) -> Callable:
        return lambda: (case for size, real in sizes for case in make(size, *more, real))

    return {
        "samples": sample_cases,
        **{f"linear{b}": lambda b=b: linear_cases(b, tiny) for b in (4, 8, 2, 3, 5, 6, 0)},  # type: ignore[misc]
        "embed": lambda: embed_cases(sizes[0][0]),
        "route": lambda: (case for size, _ in sizes for case in route_cases(size)),
        **{
            f"{op}{bits}{'' if real else 'odd'}": partial(expert_cases, size, op, dtype, real)
            for op in ("feed_forward", "experts_apart")
            for bits, dtype in ((32, mx.float32), (16, mx.bfloat16))
            for size, real in sizes
        },
        "attention_inputs": each(attention_input_cases),
        "tree_attention": each(attention_cases),
        "mix_tree": each(mix_cases),
        "replay": each(replay_cases),
        "rounds": each(round_cases),
    }
