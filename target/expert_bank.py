"""ExpertBank: preallocated memory for a number of experts of one geometry, filled in place.

The arrays that MLX computes with and the views that reads are written through are the same memory.
Whoever writes a slot makes sure that no unevaluated graph reads it. Banks begin at multiples of
what direct reads want, so that slices as long as that are read into their slots without a copy.
"""

import ctypes
import math
import mmap

import mlx.core as mx
import numpy as np

from specdec.kernels.experts import ExpertWeights
from specdec.kernels.gpu.resident import met
from specdec.kernels.weight import Weight
from specdec.shards import FLOATS
from specdec.target.read_files import ALIGNMENT
from specdec.target.store import PROJECTIONS, Geometry

HUGE_PAGE = 2 << 20


class ExpertBank:
    """`slots` experts.

    weights: gate, up [slots, intermediate, hidden'], down [slots, hidden, intermediate'].
    views: per tensor of the geometry a writable [slots, *shape] array over the same memory,
        uint16 standing for bfloat16.
    """

    def __init__(self, geometry: Geometry, slots: int, dtype: mx.Dtype) -> None:
        """dtype: of scales, biases and dense weights."""
        assert slots >= 1
        self.slots = slots
        self.views: list[np.ndarray] = []
        arrays: dict[tuple[str, str], mx.array] = {}
        for tensor in geometry.tensors:
            held = dtype if tensor.dtype in FLOATS else mx.uint32
            array = arrays[tensor.projection, tensor.tensor] = _aligned(
                (slots, *tensor.shape), held
            )
            self.views.append(_view(array))
        self.nbytes = sum(array.nbytes for array in arrays.values())
        gate, up, down = (
            Weight(
                arrays[projection, "weight"],
                arrays.get((projection, "scales")),
                arrays.get((projection, "biases")),
                quantization.bits if quantization else 0,
                quantization.group_size if quantization else 0,
            )
            for projection, quantization in zip(PROJECTIONS, geometry.quantizations, strict=True)
        )
        self.weights = ExpertWeights(gate, up, down)
        self._arrays = list(arrays.values())

    def filled(self) -> None:
        """All experts are there and stay: a CUDA device gets them now, not at their first use."""
        if mx.default_device() == mx.gpu and mx.cuda.is_available():
            met(self._arrays)


def _aligned(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Zeros whose memory begins at a multiple of ALIGNMENT."""
    size = math.prod(shape)
    flat = mx.zeros((size + ALIGNMENT // dtype.size,), dtype)
    skip = -_address(_view(flat)) % ALIGNMENT // dtype.size
    array = flat[skip : skip + size].reshape(shape)
    _on_huge_pages(_view(array))
    return array


def _on_huge_pages(zeros: np.ndarray) -> None:
    """Have Linux back memory that holds zeros with huge pages, as far as it goes.

    MLX's pages of 4 KiB lie scattered; a disk then takes a third longer to fill them (measured on
    a virtual machine with 6.18). Pages given back here come again as huge ones, zeroed.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or mx.default_device() != mx.cpu:
        return
    first = -(-_address(zeros) // HUGE_PAGE) * HUGE_PAGE
    size = (_address(zeros) + zeros.nbytes) // HUGE_PAGE * HUGE_PAGE - first
    if size > 0:
        advise = ctypes.CDLL(None).madvise
        where = ctypes.c_void_p(first), ctypes.c_size_t(size)
        if advise(*where, mmap.MADV_HUGEPAGE) == 0:
            advise(*where, mmap.MADV_DONTNEED)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _view(array: mx.array) -> np.ndarray:
    """The array's memory, which an unevaluated one does not have yet; of bfloat16 the bits."""
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(array, bits)
    return np.array(bits, copy=False)
