"""The cores that this process may use. A leaf: imports no room."""

import os
import sys
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


MOST = 8  # threads, unless more are asked for: one token's kernels take some ten microseconds each


def default_threads() -> int:
    """Threads that compute kernels, where nobody says how many."""
    return min(MOST, usable_cores())


def usable_cores() -> int:
    """Cores, of which a processor that runs two threads counts once, that the process is allowed
    to use, no more than the processor time that its control group is given; 1 at the least."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cpus = sorted(os.sched_getaffinity(0))
    cores = len({_siblings(cpu) for cpu in cpus})
    quota = _quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _siblings(cpu: int) -> str:
    """The names of all that share a processor's core; its own where the system does not tell."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> float | None:
    """Processors' worth of time that the control groups of the process leave it; None: all."""
    quotas = []
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, _, path = line.partition("::")
        if not line.startswith("0::"):
            continue
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):
            try:
                quota, period = (_GROUPS / place / "cpu.max").read_text().split()
                if quota != "max":
                    quotas.append(int(quota) / int(period))
            except (OSError, ValueError, ZeroDivisionError):
                continue
    return min(quotas, default=None)
