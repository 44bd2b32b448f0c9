"""Graphs: run by the shim as they were traced, and in words, of what MLX makes them."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map

from specdec.kernels.executor import gpu_kernels
from specdec.kernels.gpu.kernel import MetalKernel
from specdec.kernels.gpu.limits import refused
from tests.metal.run import through_shim


@contextmanager
def graphs_on_shim() -> Iterator[None]:
    """All operations run as kernels on the shim, or it is an error. It needs values: graphs run as
    they were traced, with the host's numbers of the pass that they were traced for."""
    refused.clear()
    with pytest.MonkeyPatch.context() as patch, gpu_kernels(), through_shim():
        patch.setattr(mx, "compile", lambda traced: traced)
        yield
    assert not refused


class Told(Exception):
    """A graph was traced, and is not to be run."""


def graphs_as_words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on compiled functions raise Told and add to the list what they are made of:
    constants with all their bytes, operations, their arguments, kernels' texts."""
    told: list[str] = []

    def compile_to_words(traced):
        def call(given):
            def run(*arrays):
                left = iter(arrays)
                found = traced(tree_map(lambda _: next(left), given))
                return [array for array in leaves(found) if array is not None]

            words: list[str] = []
            mx.export_function(lambda event: words.append(spelled(event)), run, *leaves(given))
            told.append("\n".join(words))
            raise Told

        return call

    monkeypatch.setattr(mx, "compile", compile_to_words)
    monkeypatch.setattr(MetalKernel, "on_gpu", property(MetalKernel.on_metal))
    return told


def leaves(tree):
    return list(dict(tree_flatten(tree)).values())


def spelled(event) -> str:
    """An event of an export; arrays with all their bytes."""
    if event["type"] != "constants":
        return repr(event)
    return repr([(n, a.dtype, a.shape, bytes(memoryview(a))) for n, a in event["constants"]])
