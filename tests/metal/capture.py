"""Capture: the exact text that MLX would give to Metal's compiler, on any machine.

While a function is exported MLX builds its kernels without running them, and prints their text
when told to be verbose. The text is not to be had otherwise where there is no Metal.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from specdec.kernels.gpu.kernel import MetalKernel, Template, Threads

PRINTED = re.compile(r"^Generated source code for `.*?`:\n```\n(.*?)\n```$", re.M | re.S)


def source_for(
    kernel: MetalKernel | Callable[..., Any],
    inputs: Sequence[mx.array],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    grid: Threads,
    threadgroup: Threads,
    template: Template | None = None,
) -> str:
    """The MSL of one launch, of a MetalKernel or of what mx.fast.metal_kernel returned."""
    arguments = list((template or {}).items())
    called: Any = kernel
    if isinstance(kernel, MetalKernel):
        arguments = kernel.check(grid, threadgroup, template or {})
        called = kernel.on_metal()

    def launch(*arrays: mx.array) -> Any:
        return called(
            inputs=arrays,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=arguments,
            verbose=True,
        )

    printed = _printed_by(lambda: mx.export_function(lambda _: None, launch, *inputs))
    found = PRINTED.search(printed)
    assert found is not None, f"MLX printed no kernel: {printed!r}"
    return found[1]


def _printed_by(action: Callable[[], object]) -> str:
    """What `action` prints, C++ included: descriptor 1 leads to a file meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            action()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode()
