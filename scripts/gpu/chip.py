"""Chip: what computed, for the record."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx


def about() -> dict[str, Any]:
    """Versions, device and system."""
    return {
        "device": str(mx.default_device()),
        "chip": _chip(),
        "mlx": _version("mlx"),
        "mlx_lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def _chip() -> str:
    if on_gpu():
        info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
        for key in ("device_name", "architecture"):
            if info.get(key):
                return str(info[key])
        return str(info)
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
