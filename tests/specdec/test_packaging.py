"""The wheel holds every room and all package data, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("target", "draft", "tree", "kernels")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The unpacked wheel of a copy of the checkout, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "scripts", "venv"
    )
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=ignore)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(folder / "checkout")],
        capture_output=True,
        text=True,
        check=False,
    )
    if "BackendUnavailable" in done.stderr or "No module named" in done.stderr:
        pytest.skip("building needs setuptools and pip in this environment")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def outside(installed, *code):
    """Run Python with the wheel alone: not from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *code],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def modules(folder):
    """Relative paths of all Python files, links not followed."""
    return {path.relative_to(folder) for path in folder.rglob("*.py")}


def test_every_module_is_in_the_wheel(installed):
    for room in ROOMS:
        assert modules(ROOT / room) == modules(installed / "specdec" / room)
    for folder in (ROOT / "specdec", ROOT / "specdec/commands", ROOT / "specdec/reports"):
        packed = installed / folder.relative_to(ROOT)
        assert {p.name for p in folder.glob("*.py")} == {p.name for p in packed.glob("*.py")}


def test_package_data_is_in_the_wheel(installed):
    assert (installed / "specdec/py.typed").is_file()
    for path in [*(ROOT / "kernels").rglob("*.metal"), *(ROOT / "kernels").rglob("*.h")]:
        assert (installed / "specdec" / path.relative_to(ROOT)).is_file()
    assert (installed / "specdec/reports/page.html.jinja").is_file()
    demo = ROOT / "specdec/demo"
    for path in demo.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_nothing_else_is_in_the_wheel(installed):
    tops = {path.name for path in installed.iterdir()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"specdec"}


def test_the_rooms_import_from_the_wheel(installed):
    names = ", ".join(f"specdec.{room}" for room in ROOMS)
    done = outside(installed, "-c", f"import {names}; print(specdec.target.__file__)")
    assert done.stdout.strip() == str(installed / "specdec/target/__init__.py"), done.stderr


def test_the_command_runs_from_the_wheel(installed):
    done = outside(installed, "-m", "specdec", "--help")
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    entry = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "specdec = specdec.entry:main" in entry.read_text()
