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
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from specdec.errors import SpecdecError
from specdec.kernels.cpu.helpers import (
    ENTRY,
    LINE,
    dismiss,
    help_callers,
    prepare,
    run,
    size,
    take,
)
from specdec.kernels.cpu.jit import inlined, intrinsic

__all__ = ["TEAM", "share", "take"]

_INDEX = ir.IntType(64)


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
        """Have so many from now on; SpecdecError if the system does not start them. Not while a
        kernel runs in another thread."""
        assert threads > 0
        if threads == self.threads:
            return
        self.close()
        if threads == 1:
            return
        self._memory = np.zeros((size(threads) + LINE) // 8, np.int64)
        place = -(-self._memory.ctypes.data // LINE) * LINE
        prepare(place, threads)
        self.place = place
        for thread in range(1, threads):
            helper = threading.Thread(
                target=help_callers, args=(place, thread), name="kernels", daemon=True
            )
            try:
                helper.start()
            except RuntimeError as why:
                self.close()  # or those that run would be waited for at the end
                raise SpecdecError(
                    f"--threads {threads}: the system starts {thread} at most ({why})"
                ) from None
            self._helpers.append(helper)

    def close(self) -> None:
        """Let the helpers go."""
        place, self.place = self.place, 0
        if place:
            dismiss(place)
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
def _share(typing, team, parts, task, arguments):  # type: ignore[no-untyped-def]
    caller = typing.resolve_value_type(run)
    run_signature = caller.get_call_type(typing, (types.int64,) * 5, {})
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

        entry = ir.Function(builder.module, ENTRY, builder.module.get_unique_name("part"))
        entry.linkage = "internal"
        inner = ir.IRBuilder(entry.append_basic_block("entry"))
        struct = inner.load(inner.bitcast(entry.args[0], data.type))
        given = [inner.extract_value(struct, i) for i in range(len(values))]
        status, done = call(inner, task, task_signature, [*entry.args[1:], *given])
        # It raises before it takes more than the part it was given: one part is done with.
        inner.ret(inner.select(status.is_error, _INDEX(-1), done))

        own = cgutils.alloca_once(builder, ir.ArrayType(_INDEX, LINE // 8))
        places = [builder.ptrtoint(place, _INDEX) for place in (entry, data, own)]
        _, failed = call(builder, caller, run_signature, [team, *places[:2], parts, places[2]])
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
