"""Each kernel by itself at the real geometry: microseconds, bytes, share of a copy's rate."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.gpu import inputs
from scripts.gpu.geometry import Geometry
from scripts.gpu.timing import CACHE_BYTES, Stopwatch, Timed, copy_rate, linked
from scripts.gpu.trees import Mixer, bush
from specdec.kernels.attention import AttentionLayout, tree_attention
from specdec.kernels.attention_inputs import attention_inputs
from specdec.kernels.executor import gpu_kernels
from specdec.kernels.experts import ExpertWeights, feed_forward
from specdec.kernels.gated_delta import mix_tree, replay
from specdec.kernels.gpu.limits import refused
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece, linear
from specdec.kernels.routing import Routing, route
from specdec.units import table

T = mx.bfloat16
LENGTH = 1000  # committed tokens, of attention


@dataclass
class Bench:
    """call(x, i): the i-th call of a chain on input x; nbytes: what one call must move."""

    name: str
    x: mx.array
    call: Callable[[mx.array, int], mx.array]
    nbytes: float
    sets: int = 8


def of_linear(rows: int, out: int, into: int, bits: int, residual: bool) -> Bench:
    sets = max(2, min(64, int(CACHE_BYTES // (out * into * bits / 8)) + 1))
    weights = [inputs.weight(T, out, into, bits=bits) for _ in range(sets)]
    norm = None if residual else inputs.norm(T, into)
    x, added = inputs.normal(T, rows, into), inputs.normal(T, rows, out) if residual else None
    mx.eval(x if added is None else added, *(array for w in weights for array in w.arrays))
    moved = weights[0].nbytes + x.nbytes + rows * out * 2 * (2 if residual else 1)
    name = f"linear {out}x{into} {bits}b " + ("residual" if residual else "norm")
    return Bench(name, x, lambda x, i: linear(x, weights[i % sets], norm, added), moved, sets)


def of_route(rows: int, g: Geometry) -> Bench:
    """With what the experts will read of x."""
    logits = inputs.normal(T, rows, g.num_experts + 1, scale=2)
    x, norm = inputs.normal(T, rows, g.hidden_size), inputs.norm(T, g.hidden_size)
    mx.eval(x)

    def call(logits: mx.array, i: int) -> mx.array:
        piece = Piece(logits, 0, g.num_experts)
        return route(piece, g.num_experts_per_tok, True, x, norm).weights

    return Bench("route", logits, call, logits.nbytes + 2 * x.nbytes)


@cache
def _bank(g: Geometry) -> ExpertWeights:
    bank = inputs.bank(T, g, g.num_experts)
    mx.eval(*(array for w in (bank.gate, bank.up, bank.down) for array in w.arrays))
    return bank


def of_experts(rows: int, g: Geometry) -> Bench:
    """With the routing and the shared expert; the rows' experts are chosen at random."""
    sets, norm = 16, inputs.norm(T, g.hidden_size)
    logits = [inputs.normal(T, rows, g.num_experts + 1, scale=2) for _ in range(sets)]
    shared = inputs.shared_expert(T, g)
    table_, bank = mx.arange(g.num_experts, dtype=mx.int32), _bank(g)
    x = inputs.normal(T, rows, g.hidden_size)
    mx.eval(x, table_)

    def routed(x: mx.array, i: int) -> Routing:
        piece = Piece(logits[i % sets], 0, g.num_experts)
        return route(piece, g.num_experts_per_tok, True, x, norm)

    def call(x: mx.array, i: int) -> mx.array:
        gate = Piece(logits[i % sets], g.num_experts, 1)
        return feed_forward(x, norm, bank, routed(x, i), table_, shared, gate)

    union = statistics.mean([len(np.unique(np.array(routed(x, i).experts))) for i in range(sets)])
    each = sum(w.nbytes for w in (bank.gate, bank.up, bank.down)) / g.num_experts
    own = sum(w.nbytes for w in (shared.gate, shared.up, shared.down))
    return Bench(f"route, feed_forward {union:.0f} experts", x, call, union * each + own, sets)


def of_attention_inputs(rows: int, g: Geometry) -> Bench:
    shape, pieces = inputs.attention_shape(T, g), inputs.attention_pieces(T, g, rows)
    cos, sin = inputs.turns(g, np.arange(rows) + LENGTH)

    def call(x: mx.array, i: int) -> mx.array:
        q, k, v = (Piece(x, piece.start, piece.width) for piece in pieces)
        return attention_inputs(q, k, v, shape, cos, sin)[0]

    x = pieces[0].rows
    return Bench("attention_inputs", x, call, 2 * x.nbytes)


def of_attention(rows: int, g: Geometry) -> Bench:
    heads, kv, dim, sets = g.num_attention_heads, g.num_key_value_heads, g.head_dim, 10
    caches = [inputs.normal(T, kv, LENGTH + 256, dim) for _ in range(2 * sets)]
    gate = Piece(inputs.normal(T, rows, 2 * heads * dim), 0, 2 * heads * dim)
    layout = AttentionLayout(TreeLayout(bush(rows)), LENGTH)
    x = inputs.normal(T, heads, rows, dim)
    mx.eval(x, gate.rows, *caches)

    def call(x: mx.array, i: int) -> mx.array:
        keys, values = caches[2 * (i % sets)], caches[2 * (i % sets) + 1]
        return tree_attention(x, keys, values, layout, dim**-0.5, gate)

    moved = 2 * (LENGTH + rows) * kv * dim * 2 + 4 * x.nbytes
    return Bench(f"tree_attention after {LENGTH}", x, call, moved, sets)


def of_mixer(rows: int, g: Geometry) -> Bench:
    mixer, sets = Mixer(g, T, rows, chain=False), 30
    states = [inputs.delta_state(T, g)[1] for _ in range(sets)]
    x, tree = mixer.inputs.qkv.rows, TreeLayout(mixer.parents)
    mx.eval(x, mixer.conv, *states)

    def call(x: mx.array, i: int) -> mx.array:
        own = type(mixer.inputs)(*(Piece(x, p.start, p.width) for p in mixer.inputs))
        return mix_tree(own, mixer.weights, mixer.conv, states[i % sets], tree)[0]

    return Bench("mix_tree", x, call, states[0].nbytes + x.nbytes, sets)


class Replay:
    """Half of a chain committed in all layers, each call on the states that the one before left."""

    TIMES = 4

    def __init__(self, rows: int, g: Geometry, layers: int) -> None:
        mixer, self.path = Mixer(g, T, rows, chain=True), list(range((rows + 1) // 2))
        tree = TreeLayout(mixer.parents)
        before = [inputs.delta_state(T, g) for _ in range(layers)]
        self.convs, self.states = ([one[at] for one in before] for at in (0, 1))
        self.tapes = [mix_tree(mixer.inputs, mixer.weights, *one, tree)[1] for one in before]
        arrays = [array for tape in self.tapes for array in tape.arrays]
        mx.eval(*self.convs, *self.states, *arrays)

    def build(self) -> list[mx.array]:
        convs, states = self.convs, self.states
        for _ in range(self.TIMES):
            convs, states = replay(convs, states, self.tapes, self.path)
        return [*convs, *states]


def makers(g: Geometry) -> list[Callable[[int], Bench]]:
    """What is timed, for a number of rows."""
    hidden, inner = g.hidden_size, g.num_attention_heads * g.head_dim
    fused = g.conv_channels + g.values + 2 * g.linear_num_value_heads
    return [
        lambda n: of_linear(n, fused, hidden, 4, False),
        lambda n: of_linear(n, g.q_features + 2 * g.kv_features, hidden, 4, False),
        lambda n: of_linear(n, hidden, inner, 4, True),
        lambda n: of_linear(n, g.num_experts + 1, hidden, 8, False),
        lambda n: of_linear(n, g.vocab_size, hidden, 4, False),
        lambda n: of_route(n, g),
        lambda n: of_experts(n, g),
        lambda n: of_attention_inputs(n, g),
        lambda n: of_attention(n, g),
        lambda n: of_mixer(n, g),
    ]


def warm(g: Geometry, rows: Sequence[int], which: int) -> None:
    """Compile what one of the makers needs, for the other processes of this machine."""
    for n in rows:
        with gpu_kernels(True):
            bench = makers(g)[which](n) if which < len(makers(g)) else None
        for on in (True, False):
            with gpu_kernels(on):
                if bench is not None:
                    mx.eval(linked(bench.x, bench.call(bench.x, 0)))
                elif n > 1:
                    mx.eval(Replay(n, g, 4).build())


def run(g: Geometry, rows: Sequence[int], repeats: int, kernels: bool) -> dict[str, Any]:
    """Figures of all kernels, and the table. kernels: False to try this out without them."""
    mx.random.seed(0)
    watch, rate = Stopwatch(repeats), copy_rate()
    print(f"copy: {rate / 1e9:.0f} GB/s, read and written", flush=True)
    figures: list[dict[str, Any]] = []

    def add(name: str, n: int, nbytes: float, time: Callable[[], Timed]) -> None:
        timed: dict[bool, Timed] = {}
        failure = ""
        for on in (True, False):
            known = len(refused)
            try:
                with gpu_kernels(on and kernels):
                    timed[on] = time()
                failure = failure or "; ".join(list(refused)[known:])
            except Exception as error:
                failure = f"{type(error).__name__}: {str(error)[:300]}"
        figures.append(_figure(name, n, timed, nbytes, rate, failure))
        took = ", ".join(f"{'ours' if on else 'MLX'} {t.device:.1f}" for on, t in timed.items())
        print(f"{name}, {n} rows: {took} us {failure}", flush=True)

    for make in makers(g):
        for n in rows:
            with gpu_kernels(kernels):  # the union of the rows' experts is made by the kernel
                bench = make(n)
            count = max(bench.sets, 24)
            chain = partial(watch.chain, bench.call, bench.x, count)
            add(bench.name, n, bench.nbytes, chain)
    layers = 30 if g.hidden_size >= 1024 else 4
    for n in (n for n in rows if n > 1):  # after one row nothing is left to replay

        def time(n: int = n) -> Timed:  # tapes are the executor's own
            return watch.natural(Replay(n, g, layers).build, Replay.TIMES)

        nbytes = layers * 2 * inputs.delta_state(T, g)[1].nbytes
        add("replay, all layers", n, nbytes, time)
    print()
    tell(figures)
    return {"copy_bytes_per_second": rate, "kernels": figures}


def _figure(
    name: str, rows: int, timed: dict[bool, Timed], nbytes: float, rate: float, failure: str
) -> dict[str, Any]:
    figure: dict[str, Any] = {"kernel": name, "rows": rows, "bytes": nbytes, "failure": failure}
    for on, key in ((True, "ours"), (False, "mlx")):
        if on in timed:
            one = timed[on]
            figure[key] = {"us": one.device, "host_us": one.host, "host_hidden": one.hidden}
    if True in timed and timed[True].device > 0:
        figure["bytes_per_second"] = nbytes / timed[True].device * 1e6
        figure["share_of_copy"] = figure["bytes_per_second"] / rate
    return figure


def tell(figures: Sequence[dict[str, Any]]) -> None:
    rows = [("kernel", "rows", "us", "host us", "MB", "GB/s", "of copy", "MLX us", "ratio")]
    for f in figures:
        ours, mlx = f.get("ours"), f.get("mlx")
        rows.append(
            (
                f["kernel"],
                str(f["rows"]),
                _us(ours),
                f"{ours['host_us']:.1f}" if ours else "-",
                f"{f['bytes'] / 1e6:.2f}",
                f"{f.get('bytes_per_second', 0) / 1e9:.0f}",
                f"{f.get('share_of_copy', 0):.0%}",
                _us(mlx),
                f"{mlx['us'] / max(ours['us'], 1e-3):.2f}" if ours and mlx else "-",
            )
        )
    print(table(rows))
    print("us: on the device; ~ where the host was slower. ratio: MLX's time over ours")
    for f in figures:
        if f["failure"]:
            print(f"FAILED {f['kernel']}, {f['rows']} rows: {f['failure']}")


def _us(one: dict[str, Any] | None) -> str:
    return "-" if one is None else f"{'' if one['host_hidden'] else '~'}{one['us']:.1f}"
