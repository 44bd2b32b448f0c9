"""MetalKernel: one body in Metal's language, run by MLX on Apple GPUs and on NVIDIA GPUs.

The body is a .metal file: the text between the braces of a kernel, whose signature MLX writes.
How to write one that both accept: docs/writing-kernels.md. Nothing is read or compiled before the
first launch. Refused: grids that are not made of whole threadgroups, of which the two platforms
would run different threads; machines without a GPU.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, TypeAlias

import mlx.core as mx

from specdec.kernels.gpu.included import included
from specdec.kernels.gpu.jit_text import SHAPES, jit_text
from specdec.kernels.gpu.kept import keep, made_for
from specdec.kernels.gpu.vocabulary import definitions, without_comments

Template: TypeAlias = Mapping[str, int | bool | mx.Dtype]
Threads: TypeAlias = tuple[int, int, int]

MAX_THREADS = 1024  # of a threadgroup, on either platform


def _here() -> Traversable:
    return files("specdec.kernels.gpu")


@dataclass(frozen=True)
class MetalKernel:
    """A kernel: `<name>.metal` in `folder`, with the functions of `helpers` (file names) before it.

    inputs, outputs: names of its arrays, in order. Inputs are row-contiguous when it runs.
    template: names of its compile-time arguments: integers of 0 or more, booleans, dtypes.
    writes: inputs that it writes into, which must be row-contiguous (MLX copies others) and whose
        readers must come after it: kernels/written.py.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    template: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    folder: Traversable = field(default_factory=_here)

    def launch(
        self,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Threads,
        threadgroup: Threads,
        template: Template | None = None,
        init_value: float | None = None,
    ) -> "Launch":
        """A launch of this kernel, checked once, to be called with inputs any number of times.

        grid: threads in x, y, z; a multiple of `threadgroup` in each, ValueError otherwise.
        init_value: what outputs hold before; else what the body does not write is undefined.
        """
        return Launch(
            self,
            tuple(output_shapes),
            tuple(output_dtypes),
            grid,
            threadgroup,
            tuple(self.check(grid, threadgroup, template or {})),
            init_value,
        )

    def check(
        self, grid: Threads, threadgroup: Threads, template: Template
    ) -> list[tuple[str, int | bool | mx.Dtype]]:
        """The template arguments in order; ValueError for a launch that cannot be meant."""
        if template.keys() != set(self.template):
            raise ValueError(
                f"kernel {self.name}: template arguments {', '.join(template) or 'none'}, "
                f"expected {', '.join(self.template) or 'none'}"
            )
        x, y, z = threadgroup
        if not 0 < x * y * z <= MAX_THREADS:
            raise ValueError(
                f"kernel {self.name}: threadgroup {threadgroup}, expected 1 to {MAX_THREADS}"
            )
        if grid[0] % x or grid[1] % y or grid[2] % z or 0 in grid:
            raise ValueError(
                f"kernel {self.name}: grid {grid} is not made of whole threadgroups {threadgroup}"
            )
        return [(name, template[name]) for name in self.template]

    @cached_property
    def body(self) -> str:
        return without_comments((self.folder / f"{self.name}.metal").read_text())

    def header(self, platform: str) -> str:
        """Vocabulary of "metal" or "cuda" and helpers, as short as can be."""
        helpers = "".join(without_comments((self.folder / h).read_text()) for h in self.helpers)
        vocabulary = (_here() / f"{platform}.h").read_text()
        return definitions(vocabulary, helpers + self.body) + helpers

    def on_metal(self) -> Any:
        """What MLX calls on Apple GPUs; it can be made anywhere."""
        return mx.fast.metal_kernel(
            name=self.name,
            input_names=self.inputs,
            output_names=self.outputs,
            source=self.body,
            header=self.header("metal"),
        )

    def on_cuda(self) -> Any:
        """What MLX calls on NVIDIA GPUs; MLX makes it only where there is one."""
        header, source = self.included()
        return mx.fast.cuda_kernel(
            name=self.name,
            input_names=self.inputs,
            output_names=self.outputs,
            source=source,
            header=header,
        )

    def included(self) -> tuple[str, str]:
        """Header and source for MLX on CUDA. It may compile at the first launch of any kind: then
        the files are to be there, also where old files of the folder are swept away."""
        header, body = self._on_cuda
        # MLX looks for these words to know what the body asks for
        asked = [f"{i}_{of}" for i in self.inputs for of in SHAPES]
        asked = [word for word in asked if word in self.body]
        return included(header), f"{included(body)}// {' '.join(asked)}\n// {made_for()}\n"

    @cached_property
    def _on_cuda(self) -> tuple[str, str]:
        return self.header("cuda"), self.body

    @cached_property
    def on_gpu(self) -> Any:
        if mx.metal.is_available():
            return self.on_metal()
        if mx.cuda.is_available():
            return self.on_cuda()
        raise RuntimeError(f"kernel {self.name}: MLX has no GPU here")


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with everything but its inputs; what MLX is told at each call is kept ready."""

    kernel: MetalKernel
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]
    grid: Threads
    threadgroup: Threads
    template: tuple[tuple[str, int | bool | mx.Dtype], ...] = ()
    init_value: float | None = None

    def __call__(self, *inputs: mx.array) -> list[mx.array]:
        """The outputs, lazily; inputs in the kernel's order."""
        if "_options" not in self.__dict__ and mx.cuda.is_available():
            self._keep(inputs)
        found: list[mx.array] = self.kernel.on_gpu(inputs=inputs, **self._options)
        return found

    def _keep(self, inputs: Sequence[mx.array]) -> None:
        """Before the first call: what MLX compiles at the first launch, compiled for good."""
        kernel = self.kernel
        header, source = kernel.included()
        given = [(n, x.dtype, x.ndim) for n, x in zip(kernel.inputs, inputs, strict=True)]
        made = list(zip(kernel.outputs, self.output_dtypes, strict=True))
        with suppress(KeyError, OSError, AttributeError):  # MLX can do without, whatever is missing
            keep(jit_text(kernel.name, header, source, given, made, self.template))

    @cached_property
    def _options(self) -> dict[str, Any]:
        return {
            "output_shapes": list(self.output_shapes),
            "output_dtypes": list(self.output_dtypes),
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "template": list(self.template),
            "init_value": self.init_value,
        }
