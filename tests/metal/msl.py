"""Msl: a captured kernel taken apart, and the C++ program that runs it.

The text stays as it is, line by line, but for declarations of threadgroup arrays: C++ has no
memory with the life of a threadgroup, so they become calls. Refused: atomic outputs.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

SIGNATURE = re.compile(r"^\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{$", re.M | re.S)
INSTANCE = re.compile(r"decltype\((.*)\) \1;$", re.M)
BUFFER = re.compile(r"(const )?(?:device|constant) (\w+)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]")
ATTRIBUTE = re.compile(r"(\w+) (\w+) \[\[(\w+)\]\]")
THREADGROUP = re.compile(r"\bthreadgroup\s+([\w:]+)\s+(\w+)\s*((?:\[[^\]\n]*\]\s*)*)(?=;|$)", re.M)

PLACES = {
    "thread_position_in_grid": "place.group * place.group_threads + place.local",
    "thread_position_in_threadgroup": "place.local",
    "thread_index_in_threadgroup": "place.index",
    "thread_index_in_simdgroup": "place.index % shim::lanes",
    "thread_index_in_quadgroup": "place.index % 4",
    "simdgroup_index_in_threadgroup": "place.index / shim::lanes",
    "quadgroup_index_in_threadgroup": "place.index / 4",
    "threadgroup_position_in_grid": "place.group",
    "threadgroups_per_grid": "place.groups",
    "threads_per_grid": "place.grid",
    "threads_per_threadgroup": "place.group_size",
    "threads_per_simdgroup": "shim::lanes",
    "thread_execution_width": "shim::lanes",
    "simdgroups_per_threadgroup": "(place.group_count + shim::lanes - 1) / shim::lanes",
    "quadgroups_per_threadgroup": "(place.group_count + 3) / 4",
    "dispatch_threads_per_threadgroup": "place.group_threads",
    "dispatch_simdgroups_per_threadgroup": "(product(place.group_threads) + 31) / 32",
    "dispatch_quadgroups_per_threadgroup": "(product(place.group_threads) + 3) / 4",
    "grid_origin": "uint3(0)",
    "grid_size": "place.grid",
}


@dataclass(frozen=True)
class Buffer:
    """One array of a kernel's signature; `x_shape`, `x_strides` and `x_ndim` are buffers too."""

    name: str
    type: str
    output: bool
    reference: bool


@dataclass(frozen=True)
class Msl:
    """The text of a kernel, and what its signature says."""

    text: str
    instance: str  # name with template arguments
    buffers: tuple[Buffer, ...]
    attributes: tuple[tuple[str, str], ...]  # type and name, in order

    @classmethod
    def parse(cls, text: str) -> "Msl":
        signature = SIGNATURE.search(text)
        if signature is None:
            raise ValueError("no kernel signature as MLX writes it")
        if "atomic<" in signature[2]:
            raise ValueError("atomic outputs are not supported")
        instance = INSTANCE.search(text)
        buffers = [
            Buffer(name, type_, not const, mark == "&")
            for const, type_, mark, name, _ in BUFFER.findall(signature[2])
        ]
        attributes = [
            (type_, name) for type_, name, _ in ATTRIBUTE.findall(signature[2]) if name in PLACES
        ]
        if len(buffers) + len(attributes) != signature[2].count("[["):
            raise ValueError(f"parameters not understood: {signature[2]}")
        return cls(
            text, instance[1] if instance else signature[1], tuple(buffers), tuple(attributes)
        )

    def program(self, written: Collection[str] = ()) -> str:
        """A C++ program for the headers of shim/; its line numbers are the text's. It gives back
        the inputs that are written into, and the outputs."""
        arguments = [
            f"{'*' * buffer.reference}reinterpret_cast<{buffer.type}*>(buffers[{i}].data)"
            for i, buffer in enumerate(self.buffers)
        ]
        arguments += [f"{type_}({PLACES[name]})" for type_, name in self.attributes]
        back = [b.output or b.name in written for b in self.buffers]
        entries = [
            f'{{"{b.name}", {str(given).lower()}}}'
            for b, given in zip(self.buffers, back, strict=True)
        ]
        return f"""#include "metal.h"
#line 1 "kernel.metal"
{THREADGROUP.sub(_declaration, self.text)}
#line 1 "launch"
static uint product(uint3 size) {{ return size.x * size.y * size.z; }}
static shim::Buffer buffers[] = {{{", ".join(entries)}}};
static void run_thread(const shim::Place& place) {{
  (void)product;
  (void)place;
  {self.instance}({", ".join(arguments)});
}}
int main(int count, char** arguments) {{
  return shim::program(count, arguments, buffers, {len(entries)}, run_thread);
}}
"""


def _declaration(found: re.Match[str]) -> str:
    return f"SHIM_THREADGROUP({found[1]}, {found[2]}, {found[3]})"
