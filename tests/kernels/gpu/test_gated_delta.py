"""The gated delta kernels against the equations in float64, trees against decoding bit for bit."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.gated_delta import DeltaInputs, DeltaWeights, Tape
from specdec.kernels.gpu.gated_delta import REPLAY, TREE, mix_tree, replay
from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.gpu.tree_program import NO_SLOT, steps
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from tests.kernels.gpu.arrays import exact
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim
from tests.trees import path_to, random_parents

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

DEMO = {"key_heads": 1, "heads": 2, "key_dim": 64, "value_dim": 64, "taps": 4}
TINY = {"key_heads": 2, "heads": 4, "key_dim": 16, "value_dim": 32, "taps": 4}
SMALL = {"key_heads": 1, "heads": 2, "key_dim": 40, "value_dim": 80, "taps": 3}
CHAIN = np.arange(-1, 6, dtype=np.int32)
# branches that go on at two depths: needs two slots
BUSH = np.array([-1, 0, 1, 1, 2, 3, 3, 0, 7, 7, 8, 9, 0, 12], np.int32)


class Layer:
    """Random weights, committed rows and inputs; everything is exact in `dtype`."""

    def __init__(self, shape, dtype=mx.float32, seed=0, rows=32):
        self.key_heads, self.heads, self.key_dim, self.value_dim, self.taps = shape.values()
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.keys = self.key_heads * self.key_dim
        self.values = self.heads * self.value_dim
        self.channels = 2 * self.keys + self.values
        a_log = np.log(self.rng.uniform(0.01, 4, self.heads)).astype(np.float32)
        dt_bias = self.rng.normal(0, 2, self.heads).astype(np.float32)
        a_log[0], dt_bias[0] = 3, -10  # a step so small that its logarithm needs a series
        self.weights = DeltaWeights(
            self.random(self.taps, self.channels),
            mx.array(a_log),
            mx.array(dt_bias),
            Norm(self.random(self.value_dim), 1e-5),
            self.key_heads,
            self.heads,
            self.key_dim,
            self.value_dim,
        )
        self.conv = self.random(self.taps - 1, self.channels)
        state = self.rng.normal(0, 0.5, (self.heads, self.value_dim, self.key_dim))
        self.state = mx.array(state.astype(np.float32))
        self.fused = self.random(rows, self.channels + self.values + 2 * self.heads + 3)

    def random(self, *shape):
        return mx.array(self.rng.standard_normal(shape, np.float32)).astype(self.dtype)

    def inputs(self, rows):
        """The inputs of some rows: qkv and b fused, z and a in an array of their own."""
        fused = self.fused[mx.array(list(rows))]
        z_and_a = mx.contiguous(fused[:, self.channels + self.heads + 2 :])
        return DeltaInputs(
            Piece(fused, 1, self.channels),
            Piece(z_and_a, 1, self.values),
            Piece(fused, self.channels + 1, self.heads),
            Piece(z_and_a, self.values + 1, self.heads),
        )


def silu(x):
    return x / (1 + np.exp(-x))


def mixed64(layer, inputs, parents):
    """y, conv and state after the last row, from the equations."""
    w, tree = layer.weights, TreeLayout(parents)
    qkv, z, b, a = (exact(piece.values) for piece in inputs)
    seen = np.concatenate([exact(layer.conv), qkv])[tree.windows(layer.taps)]
    mixed = silu((seen * exact(w.conv)).sum(1))
    q, k, v = np.split(mixed, [layer.keys, 2 * layer.keys], axis=1)
    q, k = (x.reshape(len(x), w.key_heads, w.key_dim) for x in (q, k))
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (np.repeat(x, w.heads // w.key_heads, axis=1) for x in (q / np.sqrt(w.key_dim), k))
    v = v.reshape(len(v), w.heads, w.value_dim)
    decay = np.exp(-np.exp(exact(w.a_log)) * np.logaddexp(a + exact(w.dt_bias), 0))
    beta = 1 / (1 + np.exp(-b))
    states, ys = {-1: exact(layer.state)}, []
    for row, parent in enumerate(parents):
        state = states[parent] * decay[row][:, None, None]
        delta = beta[row][:, None] * (v[row] - np.einsum("hvk,hk->hv", state, k[row]))
        states[row] = state + delta[:, :, None] * k[row][:, None, :]
        ys.append(np.einsum("hvk,hk->hv", states[row], q[row]))
    y = np.array(ys)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + w.norm.eps) * exact(w.norm.weight)
    last = np.concatenate([exact(layer.conv), qkv])[tree.windows(layer.taps)[-1][1:]]
    last = np.concatenate([last, qkv[-1:]])[1:] if len(last) == layer.taps else last
    return y.reshape(z.shape) * silu(z), last, states[len(parents) - 1]


def mixed(layer, parents, rows=None, conv=None, state=None):
    rows = range(len(parents)) if rows is None else rows
    return mix_tree(
        layer.inputs(rows),
        layer.weights,
        layer.conv if conv is None else conv,
        layer.state if state is None else state,
        TreeLayout(np.asarray(parents, np.int32)),
    )


def bits(*arrays):
    """For comparisons that tell 0 from -0."""
    return b"".join(np.array(x.astype(mx.float32)).tobytes() for x in arrays)


class Decoding:
    """Rows one by one, each path once."""

    def __init__(self, layer):
        self.layer = layer
        self.after = {(): (None, layer.conv, layer.state)}

    def __call__(self, path):
        """y of the path's last row, conv and state after it."""
        path = tuple(path)
        if path not in self.after:
            _, conv, state = self(path[:-1])
            y, tape = mixed(self.layer, [-1], path[-1:], conv, state)
            assert tape.last is not None
            (after,), (state,) = replay([conv], [state], [tape], [0])
            self.after[path] = y, after, state
        return self.after[path]


@pytest.mark.parametrize(
    ("shape", "dtype", "parents", "options"),
    [
        (TINY, mx.float32, [-1], {}),
        (TINY, mx.float32, [-1], {"sanitize": "races"}),
        (TINY, mx.float32, BUSH, {"order": "reverse"}),
        (TINY, mx.float32, BUSH, {"sanitize": "races"}),
        (SMALL, mx.float32, [-1], {"sanitize": "memory"}),
        (SMALL, mx.float32, BUSH, {"sanitize": "memory"}),
        (DEMO, mx.bfloat16, BUSH, {}),
        (TINY, mx.bfloat16, [-1], {}),
        (SMALL, mx.float16, BUSH, {}),
    ],
)
def test_outputs_state_and_window(shape, dtype, parents, options):
    layer = Layer(shape, dtype)
    with through_shim(**options):
        y, tape = mixed(layer, parents)
        path = path_to(parents, len(parents) - 1)
        (conv,), (state,) = replay([layer.conv], [layer.state], [tape], path)
    expected = mixed64(layer, layer.inputs(range(len(parents))), parents)
    assert (y.dtype, conv.dtype, state.dtype) == (dtype, dtype, mx.float32)
    tolerance = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]
    np.testing.assert_allclose(exact(y), expected[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(exact(conv), expected[1])
    np.testing.assert_allclose(exact(state), expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "parents", "options"),
    [
        (TINY, mx.float32, CHAIN, {}),
        (TINY, mx.float32, BUSH, {"order": "reverse"}),
        (TINY, mx.bfloat16, random_parents(np.random.default_rng(3), 32), {}),
        (SMALL, mx.float16, random_parents(np.random.default_rng(4), 9), {}),
        (SMALL, mx.float16, [-1, 0], {}),
    ],
)
def test_a_tree_has_the_bits_of_decoding(shape, dtype, parents, options):
    layer = Layer(shape, dtype)
    with through_shim(**options):
        decoded = Decoding(layer)
        y, tape = mixed(layer, parents)
        for row in range(len(parents)):
            path = path_to(parents, row)
            alone, *after = decoded(path)
            assert bits(y[row : row + 1]) == bits(alone)
            if row % 3 == 1:
                (conv,), (state,) = replay([layer.conv], [layer.state], [tape], path)
                assert bits(conv, state) == bits(*after)


def test_a_row_has_the_same_bits_in_every_tree():
    layer = Layer(TINY)
    rng = np.random.default_rng(5)
    with through_shim():
        decoded = Decoding(layer)
        for rows in (2, 5, 8, 17):
            parents = random_parents(rng, rows)
            inputs = rng.choice(6, rows).tolist()  # a few rows over and over, at other places
            y, _ = mixed(layer, parents, inputs)
            for row in rng.choice(rows, 3):
                path = [inputs[above] for above in path_to(parents, row)]
                assert bits(y[row : row + 1]) == bits(decoded(path)[0])


def test_layers_are_replayed_together():
    layers = [Layer(TINY, seed=seed, rows=6) for seed in range(5)]
    parents = [-1, 0, 0, 1, 3, 4]
    with through_shim():
        tapes = [mixed(layer, parents)[1] for layer in layers]
        committed = [layer.conv for layer in layers], [layer.state for layer in layers]
        for path in ([0], [0, 2], [0, 1, 3, 4, 5]):
            together = replay(*committed, tapes, path)
            for layer, tape, *after in zip(layers, tapes, *together, strict=True):
                alone = replay([layer.conv], [layer.state], [tape], path)
                assert bits(*after) == bits(alone[0][0], alone[1][0])
                assert bits(*after) == bits(*Decoding(layer)(path)[1:])


def test_what_is_not_taken():
    layer = Layer(TINY)
    y, rows = mx.zeros((1, 1)), np.arange(-1, 32)
    with through_shim():
        with pytest.raises(Unsupported, match="kernel delta_tree: 33 rows, expected 1 to 32"):
            mixed(layer, rows, [0] * 33)
        with pytest.raises(Unsupported, match=r"rows of .*float32.* and states of .*float16"):
            mixed(layer, [-1], state=layer.state.astype(mx.float16))
        with pytest.raises(Unsupported, match="tape of another executor"):
            replay([y], [y], [Tape((y, y), None)], [0])
        for shape, words in [
            ({"key_dim": 257}, "states of 32 x 257"),
            ({"value_dim": 36}, "states of 36 x 16.* a multiple of 8,"),
            ({"value_dim": 72}, "states of 72 x 16.* a multiple of 16,"),
            ({"value_dim": 144}, "states of 144 x 16, expected up to 128"),
            ({"key_dim": 160, "value_dim": 128}, "states of 128 x 160"),
            ({"taps": 9}, "9 taps, expected 2 to 8"),
            ({"key_heads": 3}, "4 value heads, expected a multiple of 3 key heads"),
        ]:
            with pytest.raises(Unsupported, match=words):
                mixed(Layer(TINY | shape, rows=1), [-1])


@pytest.mark.parametrize("seed", range(30))
def test_a_walk_meets_every_row_with_its_parents_state(seed):
    rng = np.random.default_rng(seed)
    parents = random_parents(rng, int(rng.integers(1, 33))).tolist()
    hand, met = -1, []
    slots: dict[int, int] = {}
    for row, begin, keep, leaf in steps(parents):
        hand = hand if begin == NO_SLOT else slots[begin]
        assert hand == parents[row]
        assert leaf == (row not in parents)
        hand = hand if leaf else row
        if keep != NO_SLOT:
            slots[keep] = row
        met.append(row)
    assert sorted(met) == list(range(len(parents)))
    assert 2 ** len(slots) <= max(1, len(parents))


def test_slots_of_the_walk():
    assert [step.keep for step in steps(CHAIN.tolist())] == [NO_SLOT] * 7
    assert {step.keep for step in steps([-1, 0, 0, 0, 1, 1])} == {NO_SLOT}  # leaves need none
    assert {step.keep for step in steps(BUSH.tolist())} == {NO_SLOT, 0, 1}


@pytest.mark.parametrize("alone", [True, False])
def test_cuda_compiles_and_its_registers_suffice(alone, tmp_path):
    """A threadgroup's threads share the 65536 registers of a multiprocessor; nothing spills."""
    dtype, shape = mx.bfloat16, {"KEY_DIM": 128, "VALUE_DIM": 128, "REPEATS": 2, "TAPS": 4}
    record = dtype if alone else mx.float32
    template = {"T": dtype, "R": record, "SINGLE": alone, "VALUES": 16, **shape}
    floats = [mx.float32] * 2
    inputs = [*[dtype] * 5, *floats, dtype, mx.float32, dtype, mx.float32, mx.int32, mx.int32]
    text = cuda_source(TREE, inputs, [dtype, record, mx.float32], template)
    assert compiled(text, tmp_path) <= 65536 // 256
    if alone:
        template = {"T": dtype, "VALUES": 4, "HEADS": 32, **shape}
        inputs = [mx.int32, *[dtype, *floats] * 4]
        text = cuda_source(REPLAY, inputs, [dtype, mx.float32] * 4, template)
        assert compiled(text, tmp_path) <= 128


def compiled(text, folder):
    """Registers of a kernel's CUDA text."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    (folder / "kernel.cu").write_text(text)
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings", "-Xptxas", "-v"]
    done = subprocess.run(
        [nvcc, *flags, "kernel.cu", "-o", "kernel.cubin"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores" in done.stderr
    return int(done.stderr.split("Used ")[1].split()[0])


def test_the_bodies_keep_the_rules():
    assert broken_rules(TREE) + broken_rules(REPLAY) == []
