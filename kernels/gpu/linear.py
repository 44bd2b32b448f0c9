"""Linear layers and the embedding on a GPU, for a few rows: one launch each.

The rows of one call share what is read of the weights. A row's bits do not depend on the others.
"""

from functools import cache

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, is_numpy
from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import FLOATS, GROUPS, MAX_ROWS, PACKED, Unsupported
from specdec.kernels.gpu.linear_tiles import LARGE, linear_tiles
from specdec.kernels.gpu.tiles import tiles_for
from specdec.kernels.norm import Norm
from specdec.kernels.weight import Weight

SIMDGROUPS = 2  # of a threadgroup, at least: small ones spread evenly over a GPU's cores
SHARE = 1024  # inputs of a simdgroup, at least, where several share a row of weights
PARTS = 32768  # of rows of weights, at most: a large matrix has enough to do without
ENOUGH = 4096  # simdgroups keep a large GPU busy; a small matrix gets fewer features in each

LINEAR = MetalKernel(
    "linear",
    inputs=("x", "data", "scales", "biases", "norm", "eps", "residual"),
    outputs=("out",),
    template=("T", "BITS", "GROUP", "ROWS", "OUTS", "SPLIT", "SIMDGROUPS", "NORM", "RESIDUAL"),
    helpers=("words.h", "weights.h", "dots.h", "simd_sums.h"),
)
EMBED = MetalKernel(
    "embed",
    inputs=("ids", "data", "scales", "biases"),
    outputs=("out",),
    template=("T", "BITS", "GROUP"),
    helpers=("words.h", "weights.h"),
)


def linear(
    x: mx.array, weight: Weight, norm: Norm | None = None, residual: mx.array | None = None
) -> mx.array:
    """residual + weight norm(x): x T [rows, in] -> T [rows, out]."""
    data, scales, biases = weight.data, weight.scales, weight.biases
    launch = _linear(
        x.shape,
        x.dtype,
        data.shape,
        data.dtype if scales is None else scales.dtype,
        weight.bits,
        weight.group_size,
        None if norm is None else norm.weight.dtype,
        None if residual is None else residual.dtype,
        tiles_for(x.dtype, weight.bits, weight.group_size, x.shape[1]),
    )
    # the place of what is not used is taken by any array
    if scales is None:
        scales = biases = x
    scale, eps = (x, x) if norm is None else (norm.weight, norm.on_device)
    (out,) = launch(x, data, scales, biases, scale, eps, x if residual is None else residual)
    return out


def embed(ids: Array, weight: Weight) -> mx.array:
    """ids int32 [rows] -> T [rows, hidden], T the dtype of the weight's floats."""
    data, scales, biases = weight.data, weight.scales, weight.biases
    if scales is None:
        scales = biases = data
    launch = _embed(len(ids), data.shape, scales.dtype, weight.bits, weight.group_size)
    if is_numpy(ids):
        ids = mx.array(ids.astype(np.int32))
    (out,) = launch(ids, data, scales, biases)
    return out


@cache
def _linear(
    x: tuple[int, ...],
    dtype: mx.Dtype,
    data: tuple[int, ...],
    weight_dtype: mx.Dtype,
    bits: int,
    group_size: int,
    norm_dtype: mx.Dtype | None,
    residual_dtype: mx.Dtype | None,
    tiles: bool,
) -> Launch:
    """x, data: shapes. weight_dtype: of scales, or of dense weights. tiles: tiles.h takes it."""
    _check("linear", data, weight_dtype, bits, group_size)
    if not 1 <= x[0] <= MAX_ROWS:
        raise Unsupported(f"kernel linear: {x[0]} rows, expected 1 to {MAX_ROWS}")
    others = {"weight": weight_dtype, "norm": norm_dtype, "residual": residual_dtype}
    for name, found in others.items():
        if found is not None and found != dtype:
            raise Unsupported(f"kernel linear: {name} of {found}, expected {dtype} as x")
    rows, outs = x[0], data[0]
    if tiles and x[1] * outs >= LARGE:
        extras = norm_dtype is not None, residual_dtype is not None
        return linear_tiles(rows, x[1], outs, dtype, bits, group_size, *extras)
    most = 1 << (rows - 1).bit_length()
    split = _split(x[1], outs)
    each = _features(outs * split, most)
    simdgroups = max(split, SIMDGROUPS)
    threads = 32 * simdgroups
    return LINEAR.launch(
        [(rows, outs)],
        [dtype],
        grid=(-(-outs * split // (each * simdgroups)) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template={
            "T": dtype,
            "BITS": bits,
            "GROUP": group_size or 32,
            "ROWS": most,
            "OUTS": each,
            "SPLIT": split,
            "SIMDGROUPS": simdgroups,
            "NORM": norm_dtype is not None,
            "RESIDUAL": residual_dtype is not None,
        },
    )


@cache
def _embed(rows: int, data: tuple[int, ...], dtype: mx.Dtype, bits: int, group_size: int) -> Launch:
    """data: shape. dtype: of scales, or of dense weights."""
    _check("embed", data, dtype, bits, group_size)
    hidden = data[1] * 32 // bits if bits else data[1]
    chunks = hidden // (32 if bits % 2 else 16 if bits else 8)
    return EMBED.launch(
        [(rows, hidden)],
        [dtype],
        grid=(-(-rows * chunks // 64) * 64, 1, 1),
        threadgroup=(64, 1, 1),
        template={"T": dtype, "BITS": bits, "GROUP": group_size or 32},
    )


def _check(kernel: str, data: tuple[int, ...], dtype: mx.Dtype, bits: int, group_size: int) -> None:
    """Whether weights.h reads such a matrix."""
    if len(data) != 2:
        raise Unsupported(f"kernel {kernel}: weight of {len(data)} dimensions, expected 2")
    if dtype not in FLOATS:
        raise Unsupported(
            f"kernel {kernel}: weight of {dtype}, expected float32, float16, bfloat16"
        )
    if bits == 0 and data[1] % 8:
        raise Unsupported(f"kernel {kernel}: {data[1]} inputs, expected a multiple of 8")
    if bits and (bits not in PACKED or group_size not in GROUPS):
        raise Unsupported(
            f"kernel {kernel}: {bits} bits in groups of {group_size}, "
            f"expected 2, 3, 4, 5, 6 or 8 in groups of 32, 64 or 128"
        )
    if data[0] * data[1] < 8:
        raise Unsupported(f"kernel {kernel}: a weight of {data[0] * data[1]} words, expected 8")


def _split(inputs: int, outs: int) -> int:
    """How many simdgroups share a row of weights. It decides in which order its sum is added, so
    it must not depend on the rows of x."""
    split = 1
    while inputs >= 2 * split * SHARE and 2 * split * outs <= PARTS and split < 8:
        split *= 2
    return split


def _features(sums: int, rows: int) -> int:
    """How many output features a simdgroup computes of `sums` in all; it changes no bits."""
    most = 2 if rows == 32 else 4  # as registers allow
    each = 1
    while each < most and sums >= 2 * each * ENOUGH:
        each *= 2
    return each
