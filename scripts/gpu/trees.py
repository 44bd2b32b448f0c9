"""Cases of what a tree's rows have in common: attention, the gated delta mixer and its replay.

A row's companies are its own path as a chain, and decoding that path one row at a time.
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from scripts.gpu import inputs
from scripts.gpu.case import Case, Company, Outputs
from scripts.gpu.geometry import Geometry
from scripts.gpu.inputs import of_rows, wide
from specdec.kernels.attention import AttentionLayout, tree_attention
from specdec.kernels.gated_delta import mix_tree, replay
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece

DTYPES = (mx.float32, mx.bfloat16)


def bush(rows: int) -> np.ndarray:
    """Parents of a tree with branches: rows hang off one of the three rows above them."""
    rng = np.random.default_rng(rows)
    parents = [-1, *(int(rng.integers(max(0, row - 3), row)) for row in range(1, rows))]
    return np.array(parents, np.int32)


def path_to(parents: np.ndarray, row: int) -> list[int]:
    path = [row]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    return path[::-1]


def leaves(parents: np.ndarray) -> list[int]:
    """A few rows that nobody hangs off, the last among them."""
    found = sorted(set(range(len(parents))) - set(parents.tolist()))
    return [*found[:1], *found[-1:]]


def attention_cases(g: Geometry, real: bool) -> Iterator[Callable[[], Case]]:
    def case(dtype: mx.Dtype, rows: int, length: int) -> Case:
        heads, kv, dim = g.num_attention_heads, g.num_key_value_heads, g.head_dim
        queries = inputs.normal(dtype, rows, heads, dim)
        own = [inputs.normal(dtype, rows, kv, dim) for _ in range(2)]
        committed = [inputs.normal(dtype, length, kv, dim) for _ in range(2)]
        gates = inputs.normal(dtype, rows, 2 * heads * dim)
        parents = bush(rows)
        beyond = -(-(length + rows) // 256) * 256 - length

        def call(
            path: Sequence[int], start: int, tree: TreeLayout, change: Callable = lambda x: x
        ) -> Outputs:
            """Rows path[start:] after the committed keys and those of path[:start]."""
            places = mx.array(list(path))
            caches = []
            for before, mine in zip(committed, own, strict=True):
                rest = mx.full((beyond - len(path), kv, dim), 1e4, dtype)  # of earlier rounds
                cache = mx.concatenate([before, mine[places], rest]).swapaxes(0, 1)
                caches.append(change(mx.contiguous(cache)))
            layout = AttentionLayout(tree, length + start)
            asked = mx.contiguous(queries[places[start:]].swapaxes(0, 1))
            gate = Piece(change(of_rows(gates, path[start:])), 0, gates.shape[1])
            keys, values = caches
            return [tree_attention(change(asked), keys, values, layout, dim**-0.5, gate)]

        everything, tree = list(range(rows)), TreeLayout(parents)
        companies: list[Company] = []
        for leaf in leaves(parents) if rows > 1 else []:
            path = path_to(parents, leaf)
            chain = TreeLayout.chain(len(path))
            companies.append((path, lambda p=path, c=chain: call(p, 0, c)))  # type: ignore[misc]
            last = len(path) - 1
            alone = TreeLayout.chain(1)
            companies.append(([leaf], lambda p=path, n=last, c=alone: call(p, n, c)))  # type: ignore[misc]
        return Case(
            "tree_attention",
            f"{rows} after {length}, {heads}/{kv} heads of {dim}",
            dtype,
            lambda: call(everything, 0, tree),
            lambda: call(everything, 0, tree, wide),
            companies,
            real,
        )

    lengths = [(1, 200), (7, 0), (7, 63), (7, 200)]
    if real:
        lengths += [(7, 1000), (16, 4000), (32, 130)]
    for dtype in DTYPES:
        for rows, length in lengths:
            yield lambda d=dtype, r=rows, n=length: case(d, r, n)  # type: ignore[misc]


class Mixer:
    """Inputs of one layer and a tree over them."""

    def __init__(self, g: Geometry, dtype: mx.Dtype, rows: int, chain: bool) -> None:
        self.inputs = inputs.delta_inputs(dtype, g, rows)
        self.weights = inputs.delta_weights(dtype, g)
        self.conv, self.state = inputs.delta_state(dtype, g)
        self.parents = TreeLayout.chain(rows).parents if chain else bush(rows)
        kind = "chain" if chain else "tree"
        heads = f"{g.linear_num_key_heads}/{g.linear_num_value_heads}"
        self.words = f"{rows}, {kind}, {heads} heads of {g.linear_key_head_dim}"

    def whole(self, change: Callable = lambda x: x) -> Outputs:
        """y of all rows at once."""
        own, weights = change(self.inputs), change(self.weights)
        tree = TreeLayout(self.parents)
        return [mix_tree(own, weights, change(self.conv), change(self.state), tree)[0]]

    def replayed(self, path: list[int], change: Callable = lambda x: x) -> Outputs:
        """Convolution rows and state after a path of the whole tree, as one row."""
        conv, state = change(self.conv), change(self.state)
        own, weights = change(self.inputs), change(self.weights)
        tape = mix_tree(own, weights, conv, state, TreeLayout(self.parents))[1]
        convs, states = replay([conv], [state], [tape], path)
        return [convs[0][None], states[0][None]]

    def chain(self, path: list[int]) -> Outputs:
        """y of a path by itself."""
        own = of_rows(self.inputs, path)
        tree = TreeLayout.chain(len(path))
        return [mix_tree(own, self.weights, self.conv, self.state, tree)[0]]

    def stepped(self, path: list[int]) -> tuple[Outputs, Outputs]:
        """y of a path decoded row by row, and the state after it."""
        conv, state, ys = self.conv, self.state, []
        for row in path:
            own = of_rows(self.inputs, [row])
            y, tape = mix_tree(own, self.weights, conv, state, TreeLayout.chain(1))
            (conv,), (state,) = replay([conv], [state], [tape], [0])
            mx.eval(y, conv, state)
            ys.append(y)
        return [mx.concatenate(ys)], [conv[None], state[None]]


SIZES = [(1, True), (2, True), (7, True), (7, False), (16, False), (32, False)]


def mix_cases(g: Geometry, real: bool) -> Iterator[Callable[[], Case]]:
    def case(dtype: mx.Dtype, rows: int, chain: bool) -> Case:
        mixer = Mixer(g, dtype, rows, chain)
        companies: list[Company] = []
        for leaf in leaves(mixer.parents) if rows > 1 else []:
            path = path_to(mixer.parents, leaf)
            companies.append((path, lambda p=path: mixer.chain(p)))  # type: ignore[misc]
            companies.append((path, lambda p=path: mixer.stepped(p)[0]))  # type: ignore[misc]
        reference = lambda: mixer.whole(wide)  # noqa: E731
        return Case("mix_tree", mixer.words, dtype, mixer.whole, reference, companies, real)

    for dtype in DTYPES:
        for rows, chain in SIZES if real else SIZES[2:4]:
            yield lambda d=dtype, r=rows, c=chain: case(d, r, c)  # type: ignore[misc]


def replay_cases(g: Geometry, real: bool) -> Iterator[Callable[[], Case]]:
    def case(dtype: mx.Dtype, rows: int, chain: bool, short: bool) -> Case:
        mixer = Mixer(g, dtype, rows, chain)
        path = path_to(mixer.parents, rows - 1)
        path = path[: max(1, len(path) // 2)] if short else path
        return Case(
            "replay",
            f"{len(path)} of {mixer.words}",
            dtype,
            lambda: mixer.replayed(path),
            lambda: mixer.replayed(path, wide),
            [([0], lambda: mixer.stepped(path)[1])],
            real,
        )

    for dtype in DTYPES:
        for rows, chain in SIZES if real else SIZES[2:4]:
            for short in (False, True) if rows > 1 else (False,):
                yield lambda d=dtype, r=rows, c=chain, s=short: case(d, r, c, s)  # type: ignore[misc]
