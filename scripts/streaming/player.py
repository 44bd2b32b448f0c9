"""A process that decodes on demand, for scripts/streaming/peer.py: one engine, one memory limit.

    python -m scripts.streaming.player ENGINE FOLDER TRACE LIMIT

ENGINE: `specdec` (a quarter of the experts in memory), or mlx-lm in one of three ways: `resident`
(everything in memory, no limit), `shipped` (its own lazy loading), `mapped` (experts stay in the
checkpoint's files, mapped into memory, and are copied out of them as they are used).

For every line "START TOKENS" on stdin it decodes the trace from START on, and answers with a line
of JSON. LIMIT: bytes; 0 for none. `shipped` and `mapped` hold what they allocate to it
(RLIMIT_DATA). No limit that an unprivileged process may set counts mapped pages, so `mapped` lets
go of them itself: after each token, all but the experts used last that fit beside what it has
allocated. That is what a control group would leave of its page cache if it evicted by recency
without a mistake. Pages come by MADV_WILLNEED for whole slices, which is kinder than faults.
"""

import json
import math
import mmap
import os
import resource
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.streaming.rig import Rig, Setting
from scripts.streaming.run import PROMPT, SETTLE, measure
from scripts.streaming.script import RAISED
from scripts.streaming.trace import Trace
from specdec.budget import Fixed
from specdec.checkpoint import Checkpoint
from specdec.memory import resident_bytes
from specdec.shards import TensorInfo
from specdec.target.config import TargetConfig
from specdec.target.expert_store import ExpertStore
from specdec.target.streaming import Streaming

SHARE = 0.25
Answer = dict[str, Any]


def specdec_player(folder: Path, trace: Trace, prefetch: str) -> Callable[[int, int], Answer]:
    """The engine, on the repacked folder."""
    rig = Rig(folder, Setting(SHARE, Streaming(direct=True, prefetch=prefetch)))

    def play(first: int, tokens: int) -> Answer:
        done = measure(rig, trace, first, Fixed(1), tokens)
        return {"rate": done.rate, "bytes": done.bytes_read / done.tokens}

    return play


class Peer:
    """mlx-lm's model, led along the trace like the rig, float32 as the rig has it on a CPU."""

    def __init__(self, folder: Path, trace: Trace, lazy: bool, mapped: "Mapped | None") -> None:
        from mlx_lm.utils import load_model

        self.trace, self.mapped = trace, mapped
        self.rows = np.zeros((0, 0, 0), np.int32)
        self.model, _ = load_model(folder, lazy=lazy or mapped is not None)
        for at, layer in enumerate(self.model.language_model.model.layers):
            layer.mlp.gate = _gate(layer.mlp.gate, self, at)
            if mapped is not None:
                mapped.take_over(layer.mlp.switch_mlp, at)
        if mx.default_device() == mx.cpu:  # bfloat16 is emulated there, many times slower
            self.model.set_dtype(mx.float32)
        mx.eval(self.model.parameters())

    def play(self, first: int, tokens: int) -> Answer:
        from mlx_lm.models.cache import make_prompt_cache

        if self.mapped is not None:
            self.mapped.warm(self.trace, first)
        cache = make_prompt_cache(self.model)
        self._step(first, PROMPT, cache)
        for at in range(SETTLE):
            self._step(first + PROMPT + at, 1, cache)
        before, start = _bytes_read(), perf_counter()
        for at in range(tokens):
            self._step(first + PROMPT + SETTLE + at, 1, cache)
        seconds = perf_counter() - start
        return {"rate": tokens / seconds, "bytes": (_bytes_read() - before) / tokens}

    def _step(self, at: int, count: int, cache: list[Any]) -> None:
        self.rows = self.trace.experts[at : at + count]
        tokens = mx.array(self.trace.tokens[at : at + count])
        mx.eval(mx.argmax(self.model(tokens[None], cache=cache)[:, -1]))
        if self.mapped is not None:
            self.mapped.let_go()


class Mapped:
    """Experts in the files of a checkpoint, mapped; and which of them are in memory."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.limit = limit
        checkpoint = Checkpoint.open(folder)
        self.store = ExpertStore(checkpoint, TargetConfig.of(checkpoint))
        self._files: dict[Path, mmap.mmap] = {}
        self._recent: OrderedDict[tuple[int, int], None] = OrderedDict()
        for file in self.store.files:
            self._files[file.path] = mmap.mmap(file.descriptor, 0, prot=mmap.PROT_READ)
            self._files[file.path].madvise(mmap.MADV_RANDOM)
        self._descriptors = {file.path: file.descriptor for file in self.store.files}
        self._each = self.store.geometry(self.store.layers[0]).bytes_on_disk

    def take_over(self, switch: Any, layer: int) -> None:
        """Give a layer's projections their weights from the files."""
        infos = self.store.infos(layer)
        for at, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            module = _linear(getattr(switch, name), self, layer, infos[3 * at : 3 * at + 3])
            setattr(switch, name, module)

    def rows(self, layer: int, info: TensorInfo, experts: Sequence[int]) -> mx.array:
        """A tensor's slices of some experts."""
        kinds = {"U32": np.uint32, "BF16": np.uint16}
        for expert in experts:
            self._slice(layer, info, expert, mmap.MADV_WILLNEED)
            self._recent[layer, expert] = None
            self._recent.move_to_end((layer, expert))
        whole = np.frombuffer(
            self._files[info.file], kinds[info.dtype], math.prod(info.shape), info.offset
        )
        rows = mx.array(whole.reshape(info.shape)[list(experts)])
        return rows.view(mx.bfloat16).astype(mx.float32) if info.dtype == "BF16" else rows

    def let_go(self) -> None:
        """Keep what was used last, as far as the limit goes beside what is allocated."""
        keep = max(0, (self.limit - _allocated()) // self._each)
        while len(self._recent) > keep:
            layer, expert = self._recent.popitem(last=False)[0]
            for info in self.store.infos(layer):
                self._slice(layer, info, expert, mmap.MADV_DONTNEED)

    def warm(self, trace: Trace, until: int) -> None:
        """Have in memory what a cache by recency would have, and nothing else: whoever read the
        files meanwhile left pages that count for nobody."""
        for path, file in self._files.items():
            file.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(self._descriptors[path], 0, 0, os.POSIX_FADV_DONTNEED)
        self._recent.clear()
        keep = max(0, (self.limit - _allocated()) // self._each)
        layers = self.store.layers
        for at, layer in enumerate(layers):
            experts = trace.recent(at, until, keep // len(layers))[::-1].tolist()
            for info in self.store.infos(layer):
                if experts:
                    mx.eval(self.rows(layer, info, experts))
        self.let_go()

    def _slice(self, layer: int, info: TensorInfo, expert: int, advice: int) -> None:
        size = math.prod(info.shape) * {"U32": 4, "BF16": 2}[info.dtype] // info.shape[0]
        start = (info.offset + expert * size) // mmap.PAGESIZE * mmap.PAGESIZE
        length = info.offset + (expert + 1) * size - start
        self._files[info.file].madvise(advice, start, length)
        if advice == mmap.MADV_DONTNEED:
            where = self._descriptors[info.file], start, length
            os.posix_fadvise(*where, os.POSIX_FADV_DONTNEED)


def _gate(gate: Any, peer: Peer, layer: int) -> Any:
    from mlx import nn

    class Gate(nn.Module):
        """Raises the logits of the trace's experts."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = gate

        def __call__(self, x: mx.array) -> mx.array:
            logits = self.gate(x)
            raised = np.zeros(logits.shape[1:], np.float32)
            np.put_along_axis(raised, peer.rows[:, layer], RAISED, axis=1)
            return logits + mx.array(raised).astype(logits.dtype)

    return Gate()


def _linear(like: Any, mapped: Mapped, layer: int, infos: Sequence[TensorInfo]) -> Any:
    from mlx import nn

    class Linear(nn.Module):
        """A switch layer's projection whose weights come from mapped files."""

        def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> Any:
            used, places = np.unique(np.array(indices), return_inverse=True)
            weight, scales, biases = (mapped.rows(layer, one, used.tolist()) for one in infos)
            return mx.gather_qmm(
                x,
                weight,
                scales,
                biases,
                rhs_indices=mx.array(places.reshape(indices.shape).astype(np.uint32)),
                transpose=True,
                group_size=like.group_size,
                bits=like.bits,
                sorted_indices=sorted_indices,
            )

    return Linear()


def _allocated() -> int:
    """Bytes of memory that are this process's own: no mapped file."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) << 10


def _bytes_read() -> int:
    """Bytes this process had the disk read."""
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def main() -> None:
    engine, folder, trace_file, limit = sys.argv[1:]
    trace = Trace.load(Path(trace_file))
    if int(limit):
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    if engine.startswith("specdec"):
        play = specdec_player(Path(folder), trace, engine.partition("-")[2] or "off")
    else:
        mapped = Mapped(Path(folder), int(limit)) if engine == "mapped" else None
        play = Peer(Path(folder), trace, engine == "shipped", mapped).play
    print("{}", flush=True)
    for line in sys.stdin:
        first, tokens = map(int, line.split())
        answer = {**play(first, tokens), "memory": resident_bytes()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
