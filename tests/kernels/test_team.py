"""Threads: no bit depends on how many there are, and none of them outlives, starves or hangs a
process."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.attention import AttentionLayout, tree_attention
from specdec.kernels.executor import threads, use_threads
from specdec.kernels.experts import feed_forward
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece, linear
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing
from tests.backends import CPU, fetch, needs_numba, same_bits
from tests.kernels.test_experts import bank_of
from tests.kernels.test_gated_delta import Mixer
from tests.kernels.weights import normal, some_weight
from tests.trees import random_parents

pytestmark = needs_numba
SECONDS = 60  # that a process may take which must end
COUNTS = (2, 3, 5)


@pytest.fixture(autouse=True)
def alone_again() -> Iterator[None]:
    before = threads()
    yield
    use_threads(before)


def agree(compute: Callable[[], Any]) -> None:
    """The same bits from one thread and from several."""
    use_threads(1)
    alone = fetch(compute())
    for count in COUNTS:
        use_threads(count)
        for mine, expected in zip(fetch(compute()), alone, strict=True):
            assert same_bits(mine, expected)


seeds = st.integers(0, 2**32 - 1)
packings = st.sampled_from([None, (4, 64), (4, 32), (8, 64), (3, 32)])


@given(seed=seeds, packing=packings, rows=st.integers(1, 40), out=st.integers(1, 900))
@settings(max_examples=25, deadline=None)
def test_products(seed, packing, rows, out):
    rng = np.random.default_rng(seed)
    weight = some_weight(rng, out, 256, packing=packing)[0].on(CPU)
    x, residual = normal(rng, rows, 256), normal(rng, rows, out)
    norm = Norm(normal(rng, 256), 1e-6)
    agree(lambda: [linear(x, weight, norm, residual)])


@pytest.mark.parametrize(("hidden", "inner"), [(128, 64), (256, 640)])  # whole, and split
@given(seed=seeds, rows=st.integers(1, 20))
@settings(max_examples=8, deadline=None)
def test_experts(hidden, inner, seed, rows):
    rng = np.random.default_rng(seed)
    bank = bank_of(rng, 8, [(4, 64), (8, 64), (4, 64)], hidden, inner)[0].on(CPU)
    shared, _ = bank_of(rng, 1, [(4, 64)] * 3, hidden, inner)
    one = type(shared)(*(_only(w) for w in (shared.gate, shared.up, shared.down))).on(CPU)
    experts = np.argsort(rng.random((rows, 8)), axis=1)[:, :3].astype(np.int32)
    routing = Routing(experts, rng.random((rows, 3)).astype(np.float32))
    x, gate = normal(rng, rows, hidden), Piece(normal(rng, rows, 1), 0, 1)
    norm, table = Norm(normal(rng, hidden), 1e-6), np.arange(8, dtype=np.int32)
    agree(lambda: [feed_forward(x, norm, bank, routing, table, one, gate)])


def _only(weight: Any) -> Any:
    """The one matrix of a stack."""
    return weight._each(lambda array: array[0])


@given(seed=seeds, rows=st.integers(1, 12))
@settings(max_examples=10, deadline=None)
def test_gated_delta_layers(seed, rows):
    rng = np.random.default_rng(seed)
    mixer = Mixer(CPU, rng, (4, 8, 24, 40, 4))
    parents, inputs = random_parents(rng, rows), mixer.some_rows(rng, rows)

    def compute() -> list[np.ndarray]:
        y, tape = mixer.tree(inputs, parents)
        return [y, *tape.rows, *mixer.after(tape, [0])]

    agree(compute)


@given(seed=seeds, rows=st.integers(1, 12), length=st.integers(0, 200))
@settings(max_examples=10, deadline=None)
def test_attention(seed, rows, length):
    rng = np.random.default_rng(seed)
    queries = normal(rng, 4, rows, 80)
    keys, values = (normal(rng, 2, length + rows, 80) for _ in range(2))
    layout = AttentionLayout(TreeLayout(random_parents(rng, rows)), length)
    agree(lambda: [tree_attention(queries, keys, values, layout, 0.1)])


def test_candidates():
    from specdec.kernels.cpu.candidates import top_candidates

    logits = normal(np.random.default_rng(0), 7, 3000)
    agree(lambda: list(top_candidates(logits, 9)))


# --- the team itself


def test_parts_are_computed_at_once():
    """Two threads meet in the midst of their parts; one by one they would wait for ever."""
    from numba import njit

    from specdec.kernels.cpu.team import TEAM, share, take
    from specdec.kernels.cpu.words import add, load, pause, yield_core

    @njit
    def meet(left, part, place):
        done = 0
        while part >= 0:
            add(place, 1)
            for _ in range(10**7):
                if load(place) >= 2:
                    break
                pause()
                yield_core()
            part = take(left)
            done += 1
        return done

    @njit
    def both(team, place):
        share(team, 2, meet, (place,))
        return load(place)

    met = np.zeros(1, np.int64)
    use_threads(2)
    both(0, np.full(1, 2).ctypes.data)  # compile
    assert both(TEAM.place, met.ctypes.data) == 2


@pytest.mark.parametrize("count", [1, 3])
def test_a_task_that_fails_is_an_error_and_the_team_goes_on(count):
    from numba import njit

    from specdec.kernels.cpu.team import TEAM, share, take

    @njit
    def task(left, part, out, fails):
        if fails:
            raise MemoryError
        done = 0
        while part >= 0:
            out[part] = part
            part = take(left)
            done += 1
        return done

    @njit
    def fill(team, out, fails):
        share(team, len(out), task, (out, fails))

    use_threads(count)
    for _ in range(3):
        with pytest.raises(MemoryError):
            fill(TEAM.place, np.zeros(50, np.int64), True)
        filled = np.zeros(50, np.int64)
        fill(TEAM.place, filled, False)
        assert filled.tolist() == list(range(50))


def test_two_callers_at_a_time():
    rng = np.random.default_rng(3)
    weight = some_weight(rng, 900, 256, packing=(4, 64))[0].on(CPU)
    rows = [normal(rng, 9, 256) for _ in range(2)]
    use_threads(1)
    expected = [linear(x, weight) for x in rows]
    use_threads(3)
    wrong = []

    def compute(which: int) -> None:
        for _ in range(200):
            if not same_bits(linear(rows[which], weight), expected[which]):
                wrong.append(which)

    callers = [threading.Thread(target=compute, args=(which,)) for which in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


SCRIPT = """
import os, signal, sys, threading, time
import numpy as np
from specdec.kernels.array import Backend
from specdec.kernels.executor import threads, use_threads
from specdec.kernels.linear import linear
from tests.kernels.weights import normal, some_weight
from tests.backends import CPU
rng = np.random.default_rng(0)
weight, x = some_weight(rng, 900, 256, packing=(4, 64))[0].on(CPU), normal(rng, 9, 256)
expected = linear(x, weight).tobytes()
use_threads(3)
def right():
    return all(linear(x, weight).tobytes() == expected for _ in range(50))
assert right()
"""


def process(lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT + lines]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param("", id="end"),
        pytest.param("raise SystemExit(0)", id="exit"),
        pytest.param("use_threads(1); assert right(); use_threads(2); assert right()", id="resize"),
        pytest.param(
            "from specdec.errors import SpecdecError\n"
            "start, started = threading.Thread.start, []\n"
            "def some(self):\n"
            "    if len(started) == 2: raise RuntimeError('none left')\n"
            "    started.append(self)\n"
            "    start(self)\n"
            "threading.Thread.start = some\n"
            "try: use_threads(5)\n"
            "except SpecdecError as why:\n"
            "    assert str(why) == '--threads 5: the system starts 3 at most (none left)', why\n"
            "else: raise AssertionError\n"
            "assert threads() == 1 and right()",
            id="no more threads",
        ),
        pytest.param(
            "pid = os.fork()\n"
            "if not pid:\n"
            "    alone = threads() == 1 and right()\n"
            "    use_threads(2)\n"
            "    os._exit(not (alone and right()))\n"
            "assert os.waitpid(pid, 0)[1] == 0 and right()",
            id="fork",
        ),
        pytest.param(
            "if sys.platform == 'linux':\n"
            "    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "    for task in os.listdir('/proc/self/task'):\n"
            "        os.sched_setaffinity(int(task), os.sched_getaffinity(0))\n"
            "assert right()",
            id="one core",
        ),
        pytest.param(
            "time.sleep(0.5)\n"
            "before = time.process_time()\n"
            "time.sleep(0.5)\n"
            "assert time.process_time() - before < 0.1\n"
            "assert right()",
            id="idle",
        ),
    ],
)
def test_processes_with_helpers(lines):
    done = process(lines)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_ends_a_process_that_computes():
    done = process(
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\nwhile right(): pass\n"
    )
    assert done.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in done.stderr
