"""The gated delta mixer on a GPU: one launch per layer for a tree, one for four layers to commit.

A tree of one row (plain decoding) gives its new state at once and needs no replay.
"""

from functools import cache

import mlx.core as mx
import numpy as np

from specdec.kernels.gated_delta import DeltaInputs, DeltaWeights, Tape
from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import FLOATS, MAX_ROWS, Unsupported
from specdec.kernels.gpu.resident import resident
from specdec.kernels.gpu.tree_program import most_slots, tree_program
from specdec.kernels.layout import TreeLayout

SIMDGROUPS = 8  # of a threadgroup, at most: so a thread may have all the registers there are
STATE = 64  # floats of the state in a thread's registers
MAX_VALUES = 16  # rows of the state that a simdgroup has
TAPS = range(2, 9)
LAYERS = 4  # of one launch of the replay

TREE = MetalKernel(
    "delta_tree",
    inputs=(
        "qkv",
        "z",
        "b",
        "a",
        "conv_weight",
        "a_log",
        "dt_bias",
        "norm_weight",
        "eps",
        "conv",
        "state",
        "starts",
        "program",
    ),
    outputs=("y", "record", "states"),
    template=("T", "R", "SINGLE", "VALUES", "KEY_DIM", "VALUE_DIM", "REPEATS", "TAPS"),
    helpers=("delta.h", "simd_sums.h"),
)
REPLAY = MetalKernel(
    "delta_replay",
    inputs=("path", *(f"{name}{i}" for i in range(LAYERS) for name in ("conv", "state", "tape"))),
    outputs=tuple(f"next_{name}{i}" for i in range(LAYERS) for name in ("conv", "state")),
    template=("T", "VALUES", "HEADS", "KEY_DIM", "VALUE_DIM", "REPEATS", "TAPS"),
    helpers=("delta.h",),
)


def mix_tree(
    inputs: DeltaInputs, weights: DeltaWeights, conv: mx.array, state: mx.array, tree: TreeLayout
) -> tuple[mx.array, Tape]:
    """y [rows, heads * value_dim], and the tape: an array of float32 [rows, width] for `replay`, or
    after a lone row what it leads to."""
    qkv, z, b, a = inputs
    starts = _starts(qkv.start, z.start, b.start, a.start)
    rows, taps = tree.rows, weights.conv.shape[0]
    # a lone root has no program, and its place is taken by any array
    slots, program = (most_slots(rows), tree_program(tree, taps)) if rows > 1 else (0, starts)
    launch = _tree_launch(
        qkv.rows.dtype,
        conv.dtype,
        state.dtype,
        rows,
        slots,
        weights.heads,
        weights.key_heads,
        weights.key_dim,
        weights.value_dim,
        taps,
    )
    y, record, states = launch(
        qkv.rows,
        z.rows,
        b.rows,
        a.rows,
        weights.conv,
        weights.a_log,
        weights.dt_bias,
        weights.norm.weight,
        weights.norm.on_device,
        conv,
        state,
        starts,
        program,
    )
    if rows == 1:
        return y, Tape((), (record, states))
    return y, Tape((record,), None)


def replay(
    convs: list[mx.array],
    states: list[mx.array],
    tapes: list[Tape],
    path: list[int] | mx.array,
) -> tuple[list[mx.array], list[mx.array]]:
    """Every layer's convolution rows and state after the accepted path, a list or as `padded`."""
    if any(len(tape.rows) > 1 for tape in tapes):
        raise Unsupported("kernel delta_replay: a tape of another executor, expected delta_tree's")
    if all(tape.last is not None for tape in tapes):
        assert isinstance(path, list)
        assert path == [0]
        after = [tape.last for tape in tapes if tape.last is not None]
        return [conv for conv, _ in after], [state for _, state in after]
    rows = mx.array(padded(path)) if isinstance(path, list) else path
    next_convs: list[mx.array] = []
    next_states: list[mx.array] = []
    for first in range(0, len(tapes), LAYERS):
        layers = [
            (conv, state, tape.rows[0])
            for conv, state, tape in zip(
                convs[first : first + LAYERS],
                states[first : first + LAYERS],
                tapes[first : first + LAYERS],
                strict=True,
            )
        ]
        conv, state, _ = layers[0]
        assert all(c.shape == conv.shape and s.shape == state.shape for c, s, _ in layers)
        launch = _replay_launch(conv.dtype, len(layers), *conv.shape, *state.shape)
        absent = layers[:1] * (LAYERS - len(layers))
        found = launch(rows, *(array for layer in layers + absent for array in layer))
        next_convs += found[: 2 * len(layers) : 2]
        next_states += found[1 : 2 * len(layers) : 2]
    return next_convs, next_states


def padded(path: list[int]) -> np.ndarray:
    """int32 [1 + MAX_ROWS]: the length of a path and its rows, as delta_replay reads them."""
    return np.array([len(path), *path, *[0] * (MAX_ROWS - len(path))], np.int32)


@cache
def _starts(*columns: int) -> mx.array:
    """Where in their rows the pieces begin."""
    return resident(columns, mx.int32)


@cache
def _tree_launch(
    dtype: mx.Dtype,
    conv: mx.Dtype,
    state: mx.Dtype,
    rows: int,
    slots: int,
    heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    taps: int,
) -> Launch:
    if dtype not in FLOATS or conv != dtype or state != mx.float32:
        raise _unsupported(
            f"rows of {dtype}, convolution rows of {conv} and states of {state}, "
            "expected twice the same float and float32"
        )
    if not 1 <= rows <= MAX_ROWS:
        raise _unsupported(f"{rows} rows, expected 1 to {MAX_ROWS}")
    if taps not in TAPS:
        raise _unsupported(f"{taps} taps, expected {TAPS[0]} to {TAPS[-1]}")
    if heads % key_heads:
        raise _unsupported(f"{heads} value heads, expected a multiple of {key_heads} key heads")
    values = 4
    while value_dim > SIMDGROUPS * values:
        values *= 2
    each = -(-key_dim // 32)
    if (
        value_dim % values
        or values > MAX_VALUES
        or values * each > STATE
        or key_dim % 4
        or not 4 <= key_dim <= 256
    ):
        raise _unsupported(
            f"states of {value_dim} x {key_dim}, expected up to 128 x 128 or 64 x 256, "
            f"the first a multiple of {min(values, MAX_VALUES)}, the second of 4"
        )
    alone = rows == 1
    channels = 2 * key_heads * key_dim + heads * value_dim
    width = heads * value_dim + key_heads * key_dim + heads + channels
    size = (heads, value_dim, key_dim)
    threads = 32 * value_dim // values
    return TREE.launch(
        [
            (rows, heads * value_dim),
            (taps - 1, channels) if alone else (rows, width),
            size if alone else (max(slots, 1), *(size if slots else (1, 1, 1))),
        ],
        [dtype, dtype if alone else mx.float32, mx.float32],
        grid=(heads * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template={
            "T": dtype,
            "R": dtype if alone else mx.float32,
            "SINGLE": alone,
            "VALUES": values,
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "REPEATS": heads // key_heads,
            "TAPS": taps,
        },
    )


@cache
def _replay_launch(
    dtype: mx.Dtype,
    layers: int,
    before: int,
    channels: int,
    heads: int,
    value_dim: int,
    key_dim: int,
) -> Launch:
    """A replay of layers that delta_tree took; `before` rows of convolution."""
    key_heads = (channels - heads * value_dim) // (2 * key_dim)
    simdgroups, values = 8, 4
    threadgroups = -(-heads * value_dim // (simdgroups * values))
    present = [(before, channels), (heads, value_dim, key_dim)] * layers
    return REPLAY.launch(
        present + [(1,), (1,)] * (LAYERS - layers),
        [dtype, mx.float32] * LAYERS,
        grid=(threadgroups * 32 * simdgroups, layers, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        template={
            "T": dtype,
            "VALUES": values,
            "HEADS": heads,
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "REPEATS": heads // key_heads,
            "TAPS": before + 1,
        },
    )


def _unsupported(what: str) -> Unsupported:
    return Unsupported(f"kernel delta_tree: {what}")
