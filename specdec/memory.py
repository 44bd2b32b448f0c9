"""Memory: what this machine has and what this process uses, in bytes."""

import os
import resource
import sys
from pathlib import Path

import mlx.core as mx

from specdec.mlx_environment import tell_mlx

# Share of the memory a plan may take when no cap is given.
DEFAULT_SHARE = 0.7


def default_cap() -> tuple[int, str]:
    """The cap of a plan when none is asked for, and where it comes from, in words."""
    device = mx.device_info()
    working_set = int(device.get("max_recommended_working_set_size", 0))
    if mx.metal.is_available() and working_set:
        return working_set, "Metal's recommended working set"
    total, kind = physical_memory(), "of this machine's memory"
    if mx.cuda.is_available() and "total_memory" in device:
        total, kind = min(total, int(device["total_memory"])), "of the GPU's memory"
    return int(total * DEFAULT_SHARE), f"{DEFAULT_SHARE:.0%} {kind}"


def physical_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its container's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such control group, or "max"
        return total


def start_gpu() -> None:
    """Have MLX set up its GPU in this process, and its compiler: what they take they keep."""
    tell_mlx()
    mx.eval(mx.compile(lambda x: mx.exp(x) * x)(mx.ones(32)))


def resident_bytes() -> int:
    """Bytes of memory this process holds now (on macOS: its largest amount so far)."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
