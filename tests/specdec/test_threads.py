"""--threads: it reaches the kernels, is told, and changes no token; and the cores there are."""

import os
import sys

import pytest

from specdec import cores
from specdec.commands.options import MAX_THREADS
from specdec.kernels.executor import threads, use_threads
from specdec.load import Settings, plan_for
from tests.backends import needs_numba
from tests.commands import PROMPT, recorded, run
from tests.pairs import write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def as_before():
    before = threads()
    yield
    use_threads(before)


@needs_numba
def test_tokens_of_the_demo_pair_for_any_number_of_threads(tmp_path):
    tokens = {}
    for count in (1, 2, 3, 5):
        arguments = ("--prompt", "def quicksort(", "--raw", "--max-tokens", "24", "--compare")
        _, document = recorded(tmp_path, "generate", *arguments, "--threads", str(count))
        assert document["environment"]["threads"] == threads() == count
        assert document["comparison"]["tokens_equal"] is True
        tokens[count] = [one["tokens"] for one in document["runs"].values()]
    assert all(mine == tokens[1] for mine in tokens.values())


@needs_numba
@pytest.mark.parametrize("command", ["doctor", "bench"])
def test_other_commands_take_it(pair, tmp_path, command):
    if command == "doctor":
        run("doctor", pair.target, pair.draft, "--positions", "4", "--threads", "3")
    else:
        arguments = ("--budgets", "1", "--repeat", "1", "--max-tokens", "2", "--threads", "3")
        _, document = recorded(tmp_path, "bench", *pair.options, *arguments)
        assert document["environment"]["threads"] == 3
    assert threads() == 3


def test_inspect_tells_how_many(pair, monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", "reference")
    assert "reference kernels: forced" in run("inspect", pair.target).stdout


@needs_numba
def test_inspect_tells_how_many_of_the_cpu_kernels(pair, monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", "cpu")
    monkeypatch.setattr(cores, "usable_cores", lambda: 64)
    monkeypatch.setattr(cores, "MOST", 8)
    assert "cpu kernels, 8 threads: " in run("inspect", pair.target).stdout
    for count, words in (("1", "1 thread: "), ("2", "2 threads: ")):
        done = run("inspect", pair.target, "--threads", count)
        assert f"cpu kernels, {words}" in done.stdout


def test_other_kernels_say_that_it_is_not_for_them(pair, monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", "reference")
    done = run("generate", *pair.options, *PROMPT, "--max-tokens", "2", "--threads", "2")
    assert "--threads is for the cpu kernels, not for reference" in done.stderr


@pytest.mark.parametrize("count", ["0", "-1", str(MAX_THREADS + 1), "two"])
def test_other_numbers_are_refused(pair, count):
    done = run("generate", *pair.options, *PROMPT, "--threads", count)
    assert done.exit_code == 2
    assert "Invalid value for '--threads'" in done.stderr


def test_the_memory_plan_counts_what_each_thread_keeps(pair, monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", "cpu")
    scratch = [
        next(part.bytes for part in plan_for(settings(pair, count)).parts if part.name == "scratch")
        for count in (1, 2, 3)
    ]
    assert scratch[2] - scratch[1] == scratch[1] - scratch[0] > 0


def settings(pair, count):
    return Settings(str(pair.target), str(pair.draft), threads=count)


# --- the cores there are

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine of four processors, of which two each share a core, and no control groups."""
    for name in ("_CPUS", "_GROUPS", "_OWN_GROUP"):
        monkeypatch.setattr(cores, name, tmp_path / name)
    for cpu in range(4):
        folder = tmp_path / "_CPUS" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    return tmp_path


@linux
def test_processors_of_one_core_count_once(system, monkeypatch):
    assert cores.usable_cores() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3})
    assert cores.usable_cores() == 1


@linux
def test_processors_whose_cores_are_not_told_count_each(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 8, 9})
    assert cores.usable_cores() == 3


@linux
@pytest.mark.parametrize(
    ("own", "above", "expected"),
    [
        ("max 100000", "max 100000", 2),
        ("150000 100000", "max 100000", 1),
        ("50000 100000", "max 100000", 1),
        ("max 100000", "100000 100000", 1),
        ("800000 100000", "400000 100000", 2),
        ("nonsense", "max", 2),
    ],
)
def test_control_groups_leave_so_many(system, own, above, expected):
    (system / "_OWN_GROUP").write_text("0::/some/group\n")
    group = system / "_GROUPS" / "some" / "group"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text(own + "\n")
    (group.parent / "cpu.max").write_text(above + "\n")
    assert cores.usable_cores() == expected
