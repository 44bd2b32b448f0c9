"""Whether kernels write into arrays that they are given (kernels/written.py).

MLX writes in place only into what nobody else reads at the same time, and copies it otherwise: on a
GPU, where a pass is begun while the one before runs, all keys and values of a layer. On CUDA a
kernel's inputs are plain pointers. On Metal they are declared as never written to, and no Apple GPU
has yet shown what becomes of a write: there rows go through MLX.
"""

import mlx.core as mx

from specdec.kernels.gpu.switch import Switch

_in_place = Switch()
write_in_place = _in_place.use  # kernels, or MLX


def in_place() -> bool:
    """Whether they do."""
    return mx.cuda.is_available() if _in_place.on is None else _in_place.on
