"""Direct reads go straight into slots where file and memory are aligned."""

import os

import mlx.core as mx
import numpy as np
import pytest

from specdec.errors import CheckpointError
from specdec.quantization import Quantization
from specdec.target.expert_bank import ExpertBank
from specdec.target.expert_reader import ExpertReader
from specdec.target.read_plan import Slice, pieces
from specdec.target.store import PROJECTIONS, ExpertTensor, Geometry, Span, StoreFile


def aligned(count: int, off: int = 0) -> np.ndarray:
    """uint32 [count] that begins `off` bytes behind a multiple of 4096."""
    memory = np.zeros(4 * count + 2 * 4096, np.uint8)
    skip = -memory.ctypes.data % 4096 + off
    return memory[skip : skip + 4 * count].view(np.uint32)


@pytest.mark.parametrize(
    ("offset", "count", "off", "straight"),
    [(8192, 2048, 0, True), (8192, 2048, 4, False), (4, 2048, 0, False), (8192, 2000, 0, False)],
)
def test_direct_reads_need_no_copy_where_file_and_memory_are_aligned(
    tmp_path, offset, count, off, straight
):
    target = aligned(count, off)
    wanted = Slice(Span(0, offset, 4 * count), "U32", target)
    (piece,) = pieces([wanted], 4096)
    assert piece.bounced is not straight
    buffers = piece.buffers(memoryview(bytes(8)))
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), target) is straight
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("this system asks for no alignment")
    path = tmp_path / "file.bin"
    data = np.random.default_rng(5).integers(0, 256, 20000, dtype=np.uint8)
    path.write_bytes(data.tobytes())
    with path.open("rb") as file:
        try:
            reader = ExpertReader([StoreFile(path, file.fileno())], 2, direct=True)
        except CheckpointError:
            pytest.skip("this file system has no direct reads")
        reader.submit([wanted]).wait()
        reader.close()
    assert np.array_equal(target.view(np.uint8), data[offset : offset + 4 * count])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_banks_begin_where_direct_reads_may_write(dtype):
    shapes = {
        "weight": ((128, 8), "U32"),
        "scales": ((128, 1), "BF16"),
        "biases": ((128, 1), "BF16"),
    }
    tensors = tuple(
        ExpertTensor(projection, name, *about)
        for projection in PROJECTIONS
        for name, about in shapes.items()
    )
    geometry = Geometry(tensors, (Quantization(4, 64),) * 3)
    bank = ExpertBank(geometry, 3, getattr(mx, dtype))
    assert [view.ctypes.data % 4096 for view in bank.views] == [0] * 9
    assert [view.shape for view in bank.views[:2]] == [(3, 128, 8), (3, 128, 1)]
    bank.views[0][1] = 5  # what MLX computes with is the same memory
    assert np.array(bank.weights.gate.data)[1].min() == 5
    assert bank.nbytes == 3 * geometry.bytes_resident(getattr(mx, dtype))


def test_a_bank_of_many_pages_holds_zeros_and_what_is_written():
    tensors = tuple(ExpertTensor(name, "weight", (512, 1024), "F32") for name in PROJECTIONS)
    bank = ExpertBank(Geometry(tensors, (None,) * 3), 4, mx.float32)  # 8 MiB each
    gate = bank.weights.gate.data
    assert not any(view.any() for view in bank.views)
    assert mx.abs(gate).sum().item() == 0
    bank.views[0][...] = np.arange(4, dtype=np.float32)[:, None, None]
    assert gate[:, ::100, ::100].max(axis=(1, 2)).tolist() == [0, 1, 2, 3]
    assert mx.array(bank.views[0]).sum().item() == gate.sum().item()
