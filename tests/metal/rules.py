"""Rules: what a body must not say if all platforms are to run it (docs/writing-kernels.md)."""

import re

from specdec.kernels.gpu.kernel import MetalKernel

RULES = {
    r"\b(?:device|constant|threadgroup|thread)\b": "names an address space",
    r"(?<![\w.])(?:\d+\.\d*|\.\d+|\d+(?:\.\d*)?e[+-]?\d+)(?![\w.])": "a double in CUDA: write 1.0f",
    r"\bthreads_per_grid\b|\bgrid_size\b": "differs where a grid is rounded up",
    r"\batomic\w*": "adds in no fixed order",
    r"\b(?:float|half|uint|int|uchar|bfloat)[234]\s*\(": "CUDA's vectors have no constructors",
    r"\b(?:quad_|simdgroup_(?:float|half|load|store|multiply))\w*": "has no form in CUDA here",
    r"\b\w+_ndim\b": "is no value in CUDA when a shape has none",
    r"\[\[": "attributes are MLX's to write",
}


def broken_rules(kernel: MetalKernel) -> list[str]:
    """One line per offence: the rule, and the line of the body or helper."""
    texts = [kernel.body, *((kernel.folder / name).read_text() for name in kernel.helpers)]
    lines = [line.split("//")[0].strip() for text in texts for line in text.splitlines()]
    broken = [
        f"{kernel.name}: {found[0]} {reason}: {line}"
        for line in lines
        for rule, reason in RULES.items()
        if (found := re.search(rule, line))
    ]
    if bool(kernel.writes) != any("WRITABLE" in line for line in lines):
        broken.append(
            f"{kernel.name}: writes {kernel.writes or 'no input'}, the body does otherwise"
        )
    return broken
