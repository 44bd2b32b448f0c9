"""What is told of the machine."""

import os
import platform
import subprocess
import sys

import pytest

from specdec import machine
from specdec.memory import physical_memory


def test_what_every_machine_has():
    found = machine.machine()
    assert found["system"] == sys.platform
    assert found["machine"] == platform.machine()
    assert found["memory"] >= physical_memory()
    assert found["processor"]


def test_cores_are_those_of_this_process():
    if sys.platform != "linux":
        pytest.skip("only Linux lets a process have some of the cores")
    code = "from specdec.machine import machine; print(machine()['cores'])"
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


def test_a_processor_without_a_name_has_that_of_its_kind(monkeypatch):
    def nothing(*arguments, **options):
        raise OSError("not there")

    monkeypatch.setattr(machine.Path, "read_text", nothing)
    monkeypatch.setattr(machine.subprocess, "check_output", nothing)
    assert machine.machine()["processor"] in (platform.processor(), platform.machine())
