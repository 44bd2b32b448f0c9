"""Watch: what a pass does on the host, and of which operations it consists."""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import mlx.core as mx

import specdec.target.model as model_module
import specdec.target.verify_graph as graph_module

# operations that only describe an array anew
VIEWS = {"Reshape", "Slice", "Transpose", "Broadcast", "Squeeze", "ExpandDims", "AsStrided"}
VIEWS |= {"View", "Flatten", "Unflatten", "Split", "Contiguous", "StopGradient", "Copy"}


class Watch:
    """When parts of a pass were begun, and their operations."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float]] = []  # begin and end of each start or evaluation
        self.operations: Counter[str] | None = None  # filled while it is a counter

    @contextmanager
    def on(self) -> Iterator["Watch"]:
        names, modules = ("start", "evaluate"), (model_module, graph_module)
        places = [(m, n) for m in modules for n in names if hasattr(m, n)]
        before = [getattr(module, name) for module, name in places]
        for (module, name), call in zip(places, before, strict=True):
            setattr(module, name, self._watched(call))
        try:
            yield self
        finally:
            for (module, name), call in zip(places, before, strict=True):
                setattr(module, name, call)

    def _watched(self, call: Callable[..., None]) -> Callable[..., None]:
        def watched(*arrays: Any) -> None:
            if self.operations is not None:
                self.operations += operations(*arrays)
            begin = perf_counter()
            call(*arrays)
            self.calls.append((begin, perf_counter()))

        return watched


def operations(*arrays: mx.array) -> Counter[str]:
    """The operations of the graph that these arrays wait for, by name."""
    text = io.StringIO()
    mx.export_to_dot(text, [a for a in arrays if isinstance(a, mx.array)])
    return Counter(re.findall(r'label ="(\w+)"', text.getvalue()))


def summary(found: Counter[str]) -> dict[str, Any]:
    """Kernels of ours, MLX operations that compute, views."""
    ours = sum(n for name, n in found.items() if "Custom" in name)
    views = sum(n for name, n in found.items() if name in VIEWS)
    rest = {n: c for n, c in found.most_common() if n not in VIEWS and "Custom" not in n}
    return {"kernels": ours, "mlx_operations": sum(rest.values()), "views": views, "by_name": rest}
