"""What the threads of a team do, in compiled code: helpers wait and help, callers hand over parts.

A team is some memory, given by its address; see team.py. A helper never returns to the interpreter
until it is dismissed.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from specdec.kernels.cpu.decode import address
from specdec.kernels.cpu.jit import intrinsic, jit
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
_TASK, _DATA = 0, 8  # the function and its arguments
_DONE, _FAILED = 128, 136  # parts that helpers are done with; whether one of them raised
_BUSY, _ASLEEP, _CLOSED = 256, 264, 272
_CORE = 280  # where the last caller ran
_REST, _LONG = 288, 296  # calls until helpers are asked again; how many the next time
_MUTEX, _CONDITION = 384, 512
LINE = 128
_SHARES = 640  # of every thread a line: its share of the parts, which are consecutive ones
# In such a line: parts that nobody has taken yet, the number behind the last of them; where the
# first thread's line is, and how many there are.
_LEFT, _END, _FIRST, _THREADS = 0, 8, 16, 24
_PAUSES = 64  # between two looks at what others want of the core
_ROUNDS = 1000  # of so many pauses a helper waits before it sleeps
_STAYS = 2000  # such looks before a helper that left its caller's core may have to do so again
_PATIENCE = 1 << 12  # pauses that a caller waits for a part: far longer than any takes
_ALONE, _MOST_ALONE = 1 << 9, 1 << 17  # calls that are not shared after that
_CORES = 16  # words of a set of cores
_PLACED = sys.platform == "linux"  # whether threads know their core, and may choose it
_INDEX, _DATA_POINTER = ir.IntType(64), ir.IntType(8).as_pointer()
# A task as `run` calls it: its arguments, where it takes parts, its first part.
ENTRY = ir.FunctionType(_INDEX, [_DATA_POINTER, _INDEX, _INDEX])


@intrinsic
def _call(typing, task, data, left, part):  # type: ignore[no-untyped-def]
    """A task's entry: parts done, the one given among them; negative where it raised."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        task, data, left, part = args
        function = builder.inttoptr(task, ENTRY.as_pointer())
        return builder.call(function, [builder.inttoptr(data, _DATA_POINTER), left, part])

    return types.int64(*[types.int64] * 4), generate


def size(threads: int) -> int:
    """Bytes of a team's memory."""
    return _SHARES + threads * LINE


@jit
def prepare(team, threads):  # type: ignore[no-untyped-def]
    """Make zeroed memory a team's."""
    make_mutex(team + _MUTEX)
    make_condition(team + _CONDITION)
    for thread in range(threads):
        own = team + _SHARES + thread * LINE
        swap(own + _FIRST, team + _SHARES)
        swap(own + _THREADS, threads)


@jit
def dismiss(team):  # type: ignore[no-untyped-def]
    swap(team + _CLOSED, 1)
    lock(team + _MUTEX)
    wake_all(team + _CONDITION)
    unlock(team + _MUTEX)


@jit
def help_callers(team, thread):  # type: ignore[no-untyped-def]
    """A helper's life; the caller is thread 0."""
    every, others = np.zeros(_CORES, np.int64), np.zeros(_CORES, np.int64)
    own = team + _SHARES + thread * LINE
    pauses = stays = 0
    while load(team + _CLOSED) == 0:
        if load(own + _LEFT) > 0:
            part = take(own)
            # Of what is taken now the caller waits for the end: task and data are those of it.
            if part >= 0:
                done = _call(load(team + _TASK), load(team + _DATA), own, part)
                if done < 0:
                    swap(team + _FAILED, 1)
                add(team + _DONE, abs(done))
            pauses = 0
            continue
        pause()
        pauses += 1
        if pauses % _PAUSES != 0:
            continue
        stays = max(stays - 1, 0)
        near = _PLACED and stays == 0 and this_core() == load(team + _CORE)
        if near and _leave_core(team, every, others):
            set_cores(0, 8 * _CORES, address(every))
            stays = _STAYS
        yield_core()
        if pauses >= _ROUNDS * _PAUSES:
            pauses = 0
            apart = _PLACED and _leave_core(team, every, others)
            lock(team + _MUTEX)
            add(team + _ASLEEP, 1)  # before the look, as the caller looks after its word
            if load(own + _LEFT) <= 0 and load(team + _CLOSED) == 0:
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
def take(own):  # type: ignore[no-untyped-def]
    """The number of a part that nobody else has, of a thread's own share if there are any left;
    negative: there is none anywhere. own: the thread's line.

    Shares are consecutive, and taken from the front: that is how weights are read fastest.
    """
    left = add(own + _LEFT, -1)
    if left > 0:
        return load(own + _END) - left
    for thread in range(load(own + _THREADS)):
        other = load(own + _FIRST) + thread * LINE
        if load(other + _LEFT) > 0:
            left = add(other + _LEFT, -1)
            if left > 0:
                return load(other + _END) - left
    return -1


@jit
def _alone(task, data, parts, own):  # type: ignore[no-untyped-def]
    swap(own + _END, parts)
    swap(own + _THREADS, 0)
    swap(own + _LEFT, parts)
    return _call(task, data, own, take(own)) < 0


@jit
def run(team, task, data, parts, own):  # type: ignore[no-untyped-def]
    """Have all parts computed; whether that failed. own: a line for a caller alone."""
    if parts == 0:
        return False
    if team == 0 or parts == 1 or swap(team + _BUSY, 1) != 0:
        return _alone(task, data, parts, own)
    if load(team + _REST) > 0:
        add(team + _REST, -1)
        swap(team + _BUSY, 0)
        return _alone(task, data, parts, own)
    swap(team + _DONE, 0)
    swap(team + _FAILED, 0)
    swap(team + _TASK, task)
    swap(team + _DATA, data)
    if _PLACED:
        swap(team + _CORE, this_core())
    first = team + _SHARES
    threads = load(first + _THREADS)
    for thread in range(threads - 1, -1, -1):  # the caller's last: the others may begin
        start, end = parts * thread // threads, parts * (thread + 1) // threads
        swap(first + thread * LINE + _END, end)
        swap(first + thread * LINE + _LEFT, end - start)
    if load(team + _ASLEEP) > 0:
        lock(team + _MUTEX)
        wake_all(team + _CONDITION)
        unlock(team + _MUTEX)
    done, failed = 0, False
    part = take(first)
    if part >= 0:
        done = _call(task, data, first, part)
        if done < 0:
            failed, done = True, 1
            while take(first) >= 0:
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
        swap(team + _LONG, min(4 * alone, _MOST_ALONE))
    elif alone > _ALONE:
        swap(team + _LONG, alone - 1)
    failed = failed or load(team + _FAILED) != 0
    swap(team + _BUSY, 0)
    return failed
