"""Case: an operation at one shape, its reference, and the companies its rows are computed in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from specdec.kernels.array import to_numpy
from specdec.kernels.executor import gpu_kernels

Outputs: TypeAlias = list[mx.array]  # each [rows, ...]
Company: TypeAlias = tuple[list[int], Callable[[], Outputs]]
TOLERANCE = {mx.float32: 3e-5, mx.float16: 4e-3, mx.bfloat16: 2e-2}


@dataclass
class Case:
    """run: the operation on all rows; reference: the same in float32 by plain MLX.

    companies: other ways to compute some of the rows, which must have the same bits: which rows, in
        the order of the outputs, and the call.
    real: whether it is part of the real geometry, which a kernel must take.
    """

    op: str
    shape: str
    dtype: mx.Dtype
    run: Callable[[], Outputs]
    reference: Callable[[], Outputs]
    companies: Sequence[Company] = ()
    real: bool = True


@dataclass
class Finding:
    """What came of a case. error: greatest difference over the greatest value of the reference."""

    op: str
    shape: str
    dtype: str
    error: float = float("nan")
    invariant: bool | None = None
    seconds: float = 0.0
    failure: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure and self.invariant is not False


def check(case: Case, strict: bool = True) -> Finding:
    """Run a case with the GPU kernels switched as they are.

    strict: hold it to the tolerances; MLX's own operations may round more often.
    """
    finding = Finding(case.op, case.shape, str(case.dtype).removeprefix("mlx.core."))
    start = perf_counter()
    outputs = _fetch(case.run())
    finding.seconds = perf_counter() - start
    with gpu_kernels(False), mx.stream(mx.cpu):
        expected = _fetch(case.reference())
    finding.error = max(_error(a, b) for a, b in zip(outputs, expected, strict=True))
    most = TOLERANCE[case.dtype] * (1 if strict else 4)
    if not finding.error <= most:
        finding.failure = f"error {finding.error:.1e} over {most:.0e}"
    again = list(range(len(outputs[0]))), case.run  # a race would show
    for rows, call in (again, *case.companies):
        for whole, part in zip(outputs, _fetch(call()), strict=True):
            same = whole[rows].tobytes() == part.tobytes()
            finding.invariant = same and finding.invariant is not False
            if not same and not finding.note:
                finding.note = _difference(whole, part, rows)
    return finding


def by_rows(
    call: Callable[..., Any], rowwise: Sequence[Any], count: int
) -> tuple[Callable[[], Outputs], list[Company]]:
    """`run` and `companies` of an operation whose rows know nothing of each other.

    call(*rowwise): outputs, rows first; each of rowwise has a row for each.
    """
    from scripts.gpu.inputs import of_rows

    def of(rows: list[int]) -> Callable[[], Outputs]:
        return lambda: call(*(of_rows(value, rows) for value in rowwise))

    everything = list(range(count))
    companies = [[0], [count - 1], [count // 2], everything[::-1], everything[1:4]]
    found = [(rows, of(rows)) for rows in companies if rows and count > 1]
    return of(everything), found


def _fetch(outputs: Outputs) -> list[np.ndarray]:
    mx.eval(outputs)
    return [to_numpy(output) for output in outputs]


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"shape {found.shape}, expected {expected.shape}")
    wide = expected.astype(np.float64)
    gap = np.abs(found.astype(np.float64) - wide).max(initial=0)
    return float(gap / max(np.abs(wide).max(initial=0), 1e-30))


def _difference(whole: np.ndarray, part: np.ndarray, rows: list[int]) -> str:
    """Which rows have other bits in a company, and by how much."""
    mine = whole[rows].reshape(len(rows), -1)
    theirs = part.reshape(len(rows), -1)
    differing = [
        r for r, a, b in zip(rows, mine, theirs, strict=True) if a.tobytes() != b.tobytes()
    ]
    gap = np.abs(mine.astype(np.float64) - theirs).max()
    return f"rows {differing} of company {rows} by {gap:.1e}"
