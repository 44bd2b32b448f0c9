"""Team: threads that take over parts of a kernel.

A kernel splits its output (features, experts, heads, rows: never a sum) into parts, and `share` has
them computed, in any order, by a task that every thread runs: it takes part after part. The caller
does so, and the helpers that are awake: nobody is waited for but those that have taken a part. So a
team whose helpers are late, or gone, as after a fork, is slow and nothing else; and a part has the
same bits whoever computes it.

Helpers are Python threads that sit in compiled code without the interpreter's lock. They look for
parts for some milliseconds after the last one, then sleep until there are others. Two callers at a
time: the second one computes its parts alone.
"""

import atexit
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from specdec.kernels.cpu.decode import address
from specdec.kernels.cpu.jit import inlined, intrinsic, jit
from specdec.kernels.cpu.words import (
    add,
    get_cores,
    load,
    lock,
    make_condition,
    make_mutex,
    pause,
    set_cores,
    swap,
    this_core,
    unlock,
    wait,
    wake_all,
    yield_core,
)

# What stands where in a team's memory, in bytes; what is written by different threads lies in
# lines of its own.
_LEFT, _TASK, _DATA = 0, 8, 16  # parts nobody has taken; the function and its arguments
_DONE, _FAILED = 128, 136  # parts that helpers are done with; whether one of them raised
_BUSY, _ASLEEP, _CLOSED = 256, 264, 272
_CORE = 280  # where the last caller ran
_REST, _LONG = 288, 296  # calls until helpers are asked again; how many the next time
_MUTEX, _CONDITION = 384, 512
_BYTES = 640
_LINE = 128
_PAUSES = 64  # between two looks at what others want of the core
_ROUNDS = 1000  # of so many pauses a helper waits before it sleeps
_PATIENCE = 1 << 14  # pauses that a caller waits for a part: far longer than any takes
_ALONE, _MOST_ALONE = 1 << 8, 1 << 16  # calls that are not shared after that
_CORES = 16  # words of a set of cores
_PLACED = sys.platform == "linux"  # whether threads know their core, and may choose it
_INDEX, _DATA_POINTER = ir.IntType(64), ir.IntType(8).as_pointer()


class Team:
    """The threads of this process.

    place: the address of their memory, 0 where the caller computes alone.
    """

    def __init__(self) -> None:
        self.place, self._memory = 0, np.zeros(0, np.int64)
        self._helpers: list[threading.Thread] = []

    @property
    def threads(self) -> int:
        """Threads that compute, the caller's among them."""
        return 1 + len(self._helpers)

    def resize(self, threads: int) -> None:
        """Have so many from now on. Not while a kernel runs in another thread."""
        assert threads > 0
        if threads == self.threads:
            return
        self.close()
        if threads == 1:
            return
        self._memory = np.zeros((_BYTES + _LINE) // 8, np.int64)
        place = -(-self._memory.ctypes.data // _LINE) * _LINE
        _prepare(place)
        self._helpers = [
            threading.Thread(target=_help, args=(place,), name="kernels", daemon=True)
            for _ in range(threads - 1)
        ]
        for helper in self._helpers:
            helper.start()
        self.place = place

    def close(self) -> None:
        """Let the helpers go."""
        place, self.place = self.place, 0
        if place:
            _dismiss(place)
        for helper in self._helpers:
            helper.join()
        self._helpers.clear()

    def forget(self) -> None:
        """In a child process, where the helpers are not: compute alone."""
        self.place = 0
        self._helpers = []


TEAM = Team()
# Compiled code that runs while the interpreter goes would outlive its memory.
atexit.register(TEAM.close)
os.register_at_fork(after_in_child=TEAM.forget)


@intrinsic
def _call(typing, task, data, left, part):  # type: ignore[no-untyped-def]
    """A task's entry: parts done, the one given among them; negative where it raised."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        task, data, left, part = args
        function = builder.inttoptr(task, _ENTRY.as_pointer())
        return builder.call(function, [builder.inttoptr(data, _DATA_POINTER), left, part])

    return types.int64(*[types.int64] * 4), generate


_ENTRY = ir.FunctionType(_INDEX, [_DATA_POINTER, _INDEX, _INDEX])


@jit
def _prepare(team):  # type: ignore[no-untyped-def]
    make_mutex(team + _MUTEX)
    make_condition(team + _CONDITION)


@jit
def _dismiss(team):  # type: ignore[no-untyped-def]
    swap(team + _CLOSED, 1)
    lock(team + _MUTEX)
    wake_all(team + _CONDITION)
    unlock(team + _MUTEX)


@jit
def _help(team):  # type: ignore[no-untyped-def]
    """A helper's life."""
    every, others = np.zeros(_CORES, np.int64), np.zeros(_CORES, np.int64)
    pauses = 0
    while load(team + _CLOSED) == 0:
        if load(team + _LEFT) > 0:
            part = take(team + _LEFT)
            # Of what is taken now the caller waits for the end: task and data are those of it.
            if part >= 0:
                done = _call(load(team + _TASK), load(team + _DATA), team + _LEFT, part)
                if done < 0:
                    swap(team + _FAILED, 1)
                add(team + _DONE, abs(done))
            pauses = 0
            continue
        pause()
        pauses += 1
        if pauses % _PAUSES != 0:
            continue
        near = _PLACED and this_core() == load(team + _CORE)
        if near and _leave_core(team, every, others):
            set_cores(0, 8 * _CORES, address(every))
        yield_core()
        if pauses >= _ROUNDS * _PAUSES:
            pauses = 0
            apart = _PLACED and _leave_core(team, every, others)
            lock(team + _MUTEX)
            add(team + _ASLEEP, 1)  # before the look, as the caller looks after its word
            if load(team + _LEFT) <= 0 and load(team + _CLOSED) == 0:
                wait(team + _CONDITION, team + _MUTEX)
            add(team + _ASLEEP, -1)
            unlock(team + _MUTEX)
            if apart:
                set_cores(0, 8 * _CORES, address(every))


@jit
def _leave_core(team, every, others):  # type: ignore[no-untyped-def]
    """Keep this thread off the caller's core, if it may use others; `every` says what it may.

    On two cores Linux wakes a thread on the core of the thread that wakes it, as long as that one
    is busy, and leaves both there for many milliseconds.
    """
    core = load(team + _CORE)
    every[:] = 0
    if get_cores(0, 8 * _CORES, address(every)) < 0 or core >= 64 * _CORES:
        return False
    left = False
    for i in range(_CORES):
        others[i] = every[i]
        if i == core // 64:
            others[i] &= ~(np.int64(1) << (core % 64))
        left = left or others[i] != 0
    return left and set_cores(0, 8 * _CORES, address(others)) == 0


@jit
def take(left):  # type: ignore[no-untyped-def]
    """The number of a part that nobody else has; negative: there is none any more."""
    return add(left, -1) - 1


@jit
def _run(team, task, data, parts, own):  # type: ignore[no-untyped-def]
    """Have all parts computed; whether that failed. own: a place to count when alone."""
    if parts == 0:
        return False
    if team == 0 or parts == 1 or swap(team + _BUSY, 1) != 0:
        swap(own, parts - 1)
        return _call(task, data, own, parts - 1) < 0
    if load(team + _REST) > 0:
        add(team + _REST, -1)
        swap(team + _BUSY, 0)
        swap(own, parts - 1)
        return _call(task, data, own, parts - 1) < 0
    swap(team + _DONE, 0)
    swap(team + _FAILED, 0)
    swap(team + _TASK, task)
    swap(team + _DATA, data)
    if _PLACED:
        swap(team + _CORE, this_core())
    swap(team + _LEFT, parts)
    if load(team + _ASLEEP) > 0:
        lock(team + _MUTEX)
        wake_all(team + _CONDITION)
        unlock(team + _MUTEX)
    done, failed = 0, False
    part = take(team + _LEFT)
    if part >= 0:
        done = _call(task, data, team + _LEFT, part)
        if done < 0:
            failed, done = True, 1
            while take(team + _LEFT) >= 0:
                done += 1
    pauses = 0
    while load(team + _DONE) < parts - done:
        pause()
        pauses += 1
        if pauses > _PATIENCE:
            yield_core()
    # Whoever is waited for so long has lost its core to something else, and would again.
    alone = max(load(team + _LONG), _ALONE)
    if pauses > _PATIENCE:
        swap(team + _REST, alone)
        swap(team + _LONG, min(2 * alone, _MOST_ALONE))
    elif alone > _ALONE:
        swap(team + _LONG, alone - 1)
    failed = failed or load(team + _FAILED) != 0
    swap(team + _BUSY, 0)
    return failed


@intrinsic
def _share(typing, team, parts, task, arguments):  # type: ignore[no-untyped-def]
    run = typing.resolve_value_type(_run)
    run_signature = run.get_call_type(typing, (types.int64,) * 5, {})
    task_signature = task.get_call_type(typing, (types.int64, types.int64, *arguments.types), {})

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        def call(emit: Any, dispatcher: Any, its: Any, values: list[Any]) -> Any:
            compiled = dispatcher.dispatcher.overloads[its.args]
            context.add_linking_libs((compiled.library,))
            return context.call_internal_no_propagate(emit, compiled.fndesc, its, values)

        team, parts, _, packed = args
        values = [
            _borrowed(context, builder, kind, value)
            for kind, value in zip(arguments, cgutils.unpack_tuple(builder, packed), strict=True)
        ]
        data = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, values))

        entry = ir.Function(builder.module, _ENTRY, builder.module.get_unique_name("part"))
        entry.linkage = "internal"
        inner = ir.IRBuilder(entry.append_basic_block("entry"))
        struct = inner.load(inner.bitcast(entry.args[0], data.type))
        given = [inner.extract_value(struct, i) for i in range(len(values))]
        status, done = call(inner, task, task_signature, [*entry.args[1:], *given])
        # It raises before it takes more than the part it was given: one part is done with.
        inner.ret(inner.select(status.is_error, _INDEX(-1), done))

        own = cgutils.alloca_once(builder, _INDEX)
        places = [builder.ptrtoint(place, _INDEX) for place in (entry, data, own)]
        _, failed = call(builder, run, run_signature, [team, *places[:2], parts, places[2]])
        return failed

    return types.boolean(types.int64, types.int64, task, arguments), generate


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """An array that nobody counts: the caller keeps it until all parts are done, and threads that
    count in one place are slow."""
    if not isinstance(kind, types.Array):
        return value
    array = cgutils.create_struct_proxy(kind)(context, builder, value=value)
    array.meminfo = ir.Constant(array.meminfo.type, None)
    array.parent = ir.Constant(array.parent.type, None)
    return array._getvalue()


@inlined
def share(team, parts, task, arguments):  # type: ignore[no-untyped-def]
    """Have parts 0 to parts - 1 computed by task(left, part, *arguments), in any order.

    Each thread calls it once at most, with its first part. It takes others with `take(left)` for as
    long as there are any and returns how many it computed. What it allocates, it does first.
    """
    if _share(team, parts, task, arguments):
        raise MemoryError
