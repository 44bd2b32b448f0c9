"""A whole model of real geometry: plain decoding, verify passes, mlx-lm on the same files.

All that is compared takes turns: a host's speed changes by a factor of two within minutes. A ratio
is the median over the turns of what was measured next to each other.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from scripts.gpu.peer import GuardedPeer
from scripts.gpu.timing import median_ms
from scripts.gpu.trees import bush
from scripts.gpu.watch import Watch, summary
from specdec.budget import Fixed
from specdec.checkpoint import Checkpoint
from specdec.choose import greedy
from specdec.engine import Engine
from specdec.kernels.array import choose_backend
from specdec.kernels.executor import use_gpu_kernels
from specdec.kernels.gpu.limits import refused
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.expert_store import ExpertStore
from specdec.target.model import Target
from specdec.tree.draft_tree import DraftTree
from specdec.units import table

PROMPT = 128
TURNS = 4  # for each repeat
WARM = 2  # turns that compile, and steps and passes of a turn before those that are timed
PEER_ROWS = (1, 7, 16)
BARS = ((7, 1.35), (16, 1.8))  # rows of a pass, at most so many steps of decoding

Kind = tuple[int, str]  # rows, and how their tree looks
PARTS = ("ms", "build_ms", "start_ms", "wait_ms")


def load(folder: Path, kernels: bool) -> Engine:
    """The engine with every expert in memory. kernels: use them on whatever device there is."""
    backend = choose_backend()
    use_gpu_kernels(backend.on_gpu or kernels)
    print(f"backend {backend.name}, {backend.dtype}: {backend.why}", flush=True)
    start = perf_counter()
    checkpoint = Checkpoint.open(folder)
    config = TargetConfig.of(checkpoint)
    store = ExpertStore(checkpoint, config)
    cache = ExpertCache(store, store.layers, 1, backend.dtype)
    target = Target.load(checkpoint, config, cache, backend)
    cache.load_pinned()
    print(f"loaded in {perf_counter() - start:.1f} s")
    return Engine(target, None)


def tree_of(rows: int, chain: bool, vocabulary: int) -> DraftTree:
    rng = np.random.default_rng(rows)
    parents = np.arange(-1, rows - 1, dtype=np.int32) if chain else bush(rows)
    return DraftTree(rng.integers(0, vocabulary, rows).astype(np.int32), parents, np.zeros(rows))


class Ours:
    """Steps of decoding, and passes of each kind behind one of their own kind, as in a session."""

    def __init__(self, engine: Engine, prompt: Sequence[int], rows: Sequence[int]) -> None:
        self.engine, self.watch = engine, Watch()
        vocabulary = engine.target.config.vocab_size
        self.trees: dict[Kind, DraftTree] = {
            (n, name): tree_of(n, name == "chain", vocabulary)
            for n in rows
            for name in (("chain", "tree") if n > 1 else ("chain",))
        }
        engine.prefill(prompt)

    def decode(self, count: int) -> tuple[float, float, float]:
        """Milliseconds of a step, of its pass and of its commit."""
        for _ in range(WARM):
            self.engine.step(Fixed(1))
        begin = perf_counter()
        seconds = [self.engine.step(Fixed(1)).seconds for _ in range(count)]
        spent = (perf_counter() - begin) / count
        verify = statistics.median(s.verify for s in seconds)
        return spent * 1e3, verify * 1e3, statistics.median(s.commit for s in seconds) * 1e3

    def verify(self, kind: Kind) -> tuple[float, ...]:
        """PARTS of a pass until its tokens are known to the host: all of it, beginning what was
        built, waiting, and the rest, which is building."""
        with self.watch.on():
            for _ in range(WARM):
                parts = self._once(self.trees[kind])
        return parts

    def _once(self, tree: DraftTree) -> tuple[float, ...]:
        self.watch.calls.clear()
        begin = perf_counter()
        output = self.engine.target.verify(tree)
        returned = perf_counter()
        greedy(output.logits) if output.verdict is None else output.verdict.best
        end = perf_counter()
        started = sum(last - first for first, last in self.watch.calls)
        parts = end - begin, returned - begin - started, started, end - returned
        return tuple(part * 1e3 for part in parts)

    def operations(self, kind: Kind | None) -> dict[str, Any]:
        """Of a pass, or of a step of decoding."""
        self.engine.step(Fixed(1))  # begins the next one ahead
        self.watch.operations = Counter()
        with self.watch.on():
            if kind is None:
                self.engine.step(Fixed(1))
            else:
                self._once(self.trees[kind])
        found, self.watch.operations = self.watch.operations, None
        return summary(found)

    def round_ms(self, rows: int, accepted: int, repeats: int) -> float:
        """A verify pass over a chain and the commit of its first rows."""
        target = self.engine.target
        tree = tree_of(rows, True, target.config.vocab_size)

        def once() -> None:
            greedy(target.verify(tree).logits)
            target.commit(list(range(accepted)))

        return median_ms(once, repeats)


def run(
    folder: Path, rows: Sequence[int], count: int, repeats: int, kernels: bool, against: bool
) -> dict[str, Any]:
    """Figures of the whole model, the table and the bars. count: tokens decoded in all."""
    engine = load(folder, kernels)
    prompt = np.random.default_rng(1).integers(0, engine.target.config.vocab_size, PROMPT).tolist()
    ours = Ours(engine, prompt, rows)
    turns = TURNS * repeats
    each = max(4, count // turns)
    peer = GuardedPeer(folder, prompt, (turns + WARM) * each) if against else None
    found = []
    for turn in range(WARM + turns):
        one: dict[str, Any] = {"decode": ours.decode(each)}
        one["verify"] = {kind: ours.verify(kind) for kind in ours.trees}
        if peer is not None:
            one |= peer.turn(each, [n for n in rows if n in PEER_ROWS])
        if turn >= WARM:
            found.append(one)
    figures = _figures(found, ours)
    if peer is not None:
        figures |= peer.figures(found)
    figures["round_7_accept_4_ms"] = ours.round_ms(7, 4, repeats)
    figures["backend"] = engine.target.backend.name
    figures["refused"] = list(refused)
    tell(figures)
    return figures


def _figures(turns: list[dict[str, Any]], ours: Ours) -> dict[str, Any]:
    """Medians, and ratios that are medians of each turn's ratios."""
    steps = [turn["decode"][0] for turn in turns]
    step, verify, commit = (
        statistics.median(p) for p in zip(*(t["decode"] for t in turns), strict=True)
    )
    figures: dict[str, Any] = {
        "turns": len(turns),
        "decode": {
            "tokens_per_second": 1e3 / step,
            "ms": step,
            "verify_ms": verify,
            "commit_ms": commit,
            **ours.operations(None),
        },
        "verify": {},
    }
    for kind in ours.trees:
        passes = [turn["verify"][kind] for turn in turns]
        parts = (statistics.median(part) for part in zip(*passes, strict=True))
        figures["verify"].setdefault(kind[0], {})[kind[1]] = {
            **dict(zip(PARTS, parts, strict=True)),
            "steps": statistics.median(p[0] / s for p, s in zip(passes, steps, strict=True)),
            **ours.operations(kind),
        }
    return figures


def tell(figures: dict[str, Any]) -> None:
    plain, other = figures["decode"], figures.get("mlx_lm", {})
    forwards = other.get("forward_ms", {})
    rows = [("rows", "kind", "ms", "build", "start", "wait", "kernels", "MLX ops", "mlx-lm ms")]
    for n, kinds in figures["verify"].items():
        for name, f in kinds.items():
            parts = [f"{f[key]:.2f}" for key in PARTS]
            theirs = f"{forwards[n]:.2f}" if n in forwards else "-"
            rows.append((str(n), name, *parts, str(f["kernels"]), str(f["mlx_operations"]), theirs))
    print(table(rows))
    print(
        f"decoding: {plain['tokens_per_second']:.1f} tok/s, {plain['ms']:.2f} ms a token "
        f"(verify {plain['verify_ms']:.2f}, commit {plain['commit_ms']:.2f}), {plain['kernels']} "
        f"kernels and {plain['mlx_operations']} MLX operations {plain['by_name']}"
    )
    print(f"round of 7 rows, 4 committed: {figures['round_7_accept_4_ms']:.2f} ms")
    print(f"medians of {figures['turns']} turns")
    if other:
        counts, ratio = other["operations"] or {}, other["ratio"]
        asked = counts.get("mlx_operations", "-")
        print(f"mlx-lm: {other['tokens_per_second']:.1f} tok/s, {asked} ops")
        print(f"BAR decoding against mlx-lm: {ratio:.2f}, at least 3: {_verdict(ratio >= 3)}")
    for n, most in BARS:
        for name, f in figures["verify"].get(n, {}).items():
            # decoding begins its next pass early, so its step is shorter than a pass by itself
            print(
                f"BAR {n} rows, {name}: {f['steps']:.2f} of a step of decoding, at most {most}: "
                f"{_verdict(f['steps'] <= most)}"
            )
    for words in figures["refused"]:
        print(f"REFUSED {words}")


def _verdict(met: bool) -> str:
    return "met" if met else "NOT MET"
