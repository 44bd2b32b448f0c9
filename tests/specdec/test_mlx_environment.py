"""What MLX is told before it starts: set in time, and never over what the user set."""

import os
import subprocess
import sys

import pytest

from specdec.mlx_environment import DEFAULTS

# Prints what is set when MLX is first looked for.
AT_IMPORT = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core":
            print(*(os.environ.get(name) for name in NAMES), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder())
from specdec.entry import main
sys.argv = ["specdec", "inspect"]
main()
"""
# A program of the library's user, who imported MLX before.
AT_LOADING = """
import os
import mlx.core
from specdec.memory import start_gpu
start_gpu()
print(*(os.environ.get(name) for name in NAMES))
"""


@pytest.mark.parametrize("program", [AT_IMPORT, AT_LOADING])
def test_mlx_finds_what_it_is_told(program):
    names = list(DEFAULTS)
    environment = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    told = list(DEFAULTS.values())
    for own in ({}, {names[0]: "1"}):
        done = subprocess.run(
            [sys.executable, "-c", f"NAMES = {names}\n{program}"],
            env=environment | own,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split() == [*own.values(), *told[len(own) :]], done.stderr
