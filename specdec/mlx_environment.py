"""MlxEnvironment: what MLX reads from the environment, set before it starts; what is set stands.

All of it concerns MLX on CUDA (0.32), elsewhere nobody reads it.
"""

import os

DEFAULTS = {
    # MLX keeps a graph for each kind of pass, and trees have many: up to 1 GB on the device and 300
    # MB on the host after 1,200 tokens with changing budgets, which no plan can tell. Launched one
    # by one, kernels take about as long. docs/kernels.md has the figures.
    "MLX_USE_CUDA_GRAPHS": "0",
    # For who switches them on: MLX counts what its caches of graphs and of plans for attention
    # missed, never forgets, and ends the process at twice a cache's size. Prompts of many lengths
    # are enough.
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}


def tell_mlx() -> None:
    """To be called before the first import of MLX, when it makes its caches of plans. Its cache of
    graphs is made, and whether there are graphs is read, when its GPU first computes."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
