"""What threads need that Numba has no words for: atomic integers in memory, and waiting.

Memory is given by addresses of int64. All operations are sequentially consistent, so that code may
be read as it stands.
"""

import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from specdec.kernels.cpu.jit import intrinsic

_INDEX, _INT, _BYTES = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
_ORDER, _SIZE = "seq_cst", 8
# Tells the processor that a loop waits: the other thread of its core goes on, and it saves power.
_YIELD = ("llvm.aarch64.hint", [ir.Constant(_INT, 1)])
_PAUSE = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": _YIELD, "arm64": _YIELD}


@intrinsic
def load(typing, place):  # type: ignore[no-untyped-def]
    """The value at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        pointer = builder.inttoptr(args[0], _INDEX.as_pointer())
        return builder.load_atomic(pointer, _ORDER, _SIZE)

    return types.int64(types.int64), generate


def _change(operation: str) -> Callable[..., Any]:
    """The intrinsic that changes a value in one step, and gives what it was."""

    @intrinsic
    def change(typing, place, value):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            pointer = builder.inttoptr(args[0], _INDEX.as_pointer())
            return builder.atomic_rmw(operation, pointer, args[1], _ORDER)

        return types.int64(types.int64, types.int64), generate

    return change


add, swap = _change("add"), _change("xchg")


@intrinsic
def pause(typing):  # type: ignore[no-untyped-def]
    """A short wait within a loop."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        if platform.machine() in _PAUSE:
            name, values = _PAUSE[platform.machine()]
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)
        return context.get_dummy_value()

    return types.void(), generate


def _system(name: str, kinds: str = "", nulls: int = 0) -> Callable[..., Any]:
    """The intrinsic that calls a function of the C library. kinds: of its arguments, each "p", an
    address, "n", a size, or "i", an int; `nulls` null pointers come behind them."""
    each = {"p": _BYTES, "n": _INDEX, "i": _INT}

    @intrinsic
    def call(typing, *values):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            kind = ir.FunctionType(_INT, [each[one] for one in kinds] + [_BYTES] * nulls)
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            given = []
            for one, value in zip(kinds, cgutils.unpack_tuple(builder, args[0]), strict=True):
                shorter = builder.trunc(value, _INT) if one == "i" else value
                given.append(builder.inttoptr(value, _BYTES) if one == "p" else shorter)
            nothing = [ir.Constant(_BYTES, None)] * nulls
            return builder.sext(builder.call(function, [*given, *nothing]), _INDEX)

        return types.int64(types.StarArgTuple((types.int64,) * len(kinds))), generate

    return call


yield_core = _system("sched_yield")
make_mutex = _system("pthread_mutex_init", "p", nulls=1)
lock, unlock = _system("pthread_mutex_lock", "p"), _system("pthread_mutex_unlock", "p")
make_condition = _system("pthread_cond_init", "p", nulls=1)
wait, wake_all = _system("pthread_cond_wait", "pp"), _system("pthread_cond_broadcast", "p")
# Of Linux alone: a thread's core, and those it may use, as a set of bits (0: the calling thread).
this_core = _system("sched_getcpu")
get_cores, set_cores = _system("sched_getaffinity", "inp"), _system("sched_setaffinity", "inp")
