"""A whole model of real geometry: plain decoding, verify passes, mlx-lm on the same files."""

import io
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

import specdec.target.model as model_module
import specdec.target.verify_graph as graph_module
from scripts.gpu.timing import median_ms
from scripts.gpu.trees import bush
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

# operations that only describe an array anew
VIEWS = {"Reshape", "Slice", "Transpose", "Broadcast", "Squeeze", "ExpandDims", "AsStrided"}
VIEWS |= {"View", "Flatten", "Unflatten", "Split", "Contiguous", "StopGradient", "Copy"}
PROMPT = 128
TURNS = 8  # of the kinds of verify passes, for each repeat


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


class Watch:
    """What a pass does on the host: when it was begun, part by part, and of what it consists."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float]] = []  # begin and end of each start or evaluation
        self.operations: Counter[str] | None = None  # filled while it is a counter

    @contextmanager
    def on(self) -> Iterator["Watch"]:
        names, modules = ("start", "evaluate"), (model_module, graph_module)
        places = [(m, n) for m in modules for n in names if hasattr(m, n)]
        before = [getattr(module, name) for module, name in places]
        for (module, name), call in zip(places, before, strict=True):
            setattr(module, name, self._watched(call))
        try:
            yield self
        finally:
            for (module, name), call in zip(places, before, strict=True):
                setattr(module, name, call)

    def _watched(self, call: Callable[..., None]) -> Callable[..., None]:
        def watched(*arrays: Any) -> None:
            if self.operations is not None:
                self.operations += operations(*arrays)
            begin = perf_counter()
            call(*arrays)
            self.calls.append((begin, perf_counter()))

        return watched


def operations(*arrays: mx.array) -> Counter[str]:
    """The operations of the graph that these arrays wait for, by name."""
    text = io.StringIO()
    mx.export_to_dot(text, [a for a in arrays if isinstance(a, mx.array)])
    return Counter(re.findall(r'label ="(\w+)"', text.getvalue()))


def summary(found: Counter[str]) -> dict[str, Any]:
    """Kernels of ours, MLX operations that compute, views."""
    ours = sum(n for name, n in found.items() if "Custom" in name)
    views = sum(n for name, n in found.items() if name in VIEWS)
    rest = {n: c for n, c in found.most_common() if n not in VIEWS and "Custom" not in n}
    return {"kernels": ours, "mlx_operations": sum(rest.values()), "views": views, "by_name": rest}


def tree_of(rows: int, chain: bool, vocabulary: int) -> DraftTree:
    rng = np.random.default_rng(rows)
    parents = np.arange(-1, rows - 1, dtype=np.int32) if chain else bush(rows)
    return DraftTree(rng.integers(0, vocabulary, rows).astype(np.int32), parents, np.zeros(rows))


Kind = tuple[int, str]


def verify(engine: Engine, trees: dict[Kind, DraftTree], turns: int) -> dict[Kind, dict[str, Any]]:
    """ms of verify passes until their tokens are known to the host, the kinds taking turns: in all,
    beginning what was built, waiting, and the rest, which is building."""
    spent: dict[Kind, list[tuple[float, ...]]] = {kind: [] for kind in trees}
    counts: dict[Kind, dict[str, Any]] = {}
    watch = Watch()

    def once(tree: DraftTree) -> tuple[float, ...]:
        watch.calls.clear()
        begin = perf_counter()
        output = engine.target.verify(tree)
        returned = perf_counter()
        greedy(output.logits) if output.verdict is None else output.verdict.best
        end = perf_counter()
        started = sum(last - first for first, last in watch.calls)
        return end - begin, returned - begin - started, started, end - returned

    with watch.on():
        for turn in range(turns + 2):  # the first two compile
            for kind, tree in trees.items():
                once(tree)  # in a session, too, a pass comes after others of its kind
                parts = once(tree)
                if turn > 1:
                    spent[kind].append(parts)
        for kind, tree in trees.items():
            watch.operations = Counter()
            once(tree)
            counts[kind] = summary(watch.operations)
    names = ("ms", "build_ms", "start_ms", "wait_ms")
    return {
        kind: {
            **dict(
                zip(
                    names,
                    (statistics.median(p) * 1e3 for p in zip(*found, strict=True)),
                    strict=True,
                )
            ),
            **counts[kind],
        }
        for kind, found in spent.items()
    }


def decode(engine: Engine, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Plain decoding: tokens per second, and a token's operations."""
    engine.prefill(prompt)
    for _ in range(4):
        engine.step(Fixed(1))
    begin = perf_counter()
    seconds = [engine.step(Fixed(1)).seconds for _ in range(count)]
    spent = perf_counter() - begin
    watch = Watch()
    watch.operations = Counter()
    with watch.on():
        engine.step(Fixed(1))
    return {
        "tokens_per_second": count / spent,
        "ms": spent / count * 1e3,
        "verify_ms": statistics.median(s.verify for s in seconds) * 1e3,
        "commit_ms": statistics.median(s.commit for s in seconds) * 1e3,
        **summary(watch.operations),
    }


def round_ms(engine: Engine, rows: int, accepted: int, repeats: int) -> float:
    """A verify pass over a chain and the commit of its first rows."""
    tree = tree_of(rows, True, engine.target.config.vocab_size)

    def once() -> None:
        greedy(engine.target.verify(tree).logits)
        engine.target.commit(list(range(accepted)))

    return median_ms(once, repeats)


def peer(
    folder: Path, prompt: Sequence[int], rows: Sequence[int], count: int, repeats: int
) -> dict[str, Any]:
    """mlx-lm on the same files: decoding with its own loop, forwards of several rows."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    mx.eval(model.parameters())
    times = []
    for _ in generate_step(mx.array(list(prompt)), model, max_tokens=count + 8):
        times.append(perf_counter())
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array(list(prompt))[None], cache=cache))
    rng = np.random.default_rng(0)
    forwards = {}
    for n in rows:
        tokens = mx.array(rng.integers(0, 256, (1, n)))
        forwards[n] = median_ms(lambda t=tokens: mx.eval(model(t, cache=cache)), repeats)  # type: ignore[misc]
    counts = summary(operations(model(mx.array([[1]]), cache=cache)))
    return {
        "tokens_per_second": count / (times[-1] - times[7]),
        "forward_ms": forwards,
        "operations": counts,
    }


def run(
    folder: Path, rows: Sequence[int], count: int, repeats: int, kernels: bool, against: bool
) -> dict[str, Any]:
    """Figures of the whole model, the table and the bars."""
    engine = load(folder, kernels)
    vocabulary = engine.target.config.vocab_size
    prompt = np.random.default_rng(1).integers(0, vocabulary, PROMPT).tolist()
    figures: dict[str, Any] = {"decode": decode(engine, prompt, count), "verify": {}}
    figures["backend"] = engine.target.backend.name
    trees = {
        (n, name): tree_of(n, name == "chain", vocabulary)
        for n in rows
        for name in (("chain", "tree") if n > 1 else ("chain",))
    }
    for (n, name), found in verify(engine, trees, TURNS * repeats).items():
        figures["verify"].setdefault(n, {})[name] = found
    figures["round_7_accept_4_ms"] = round_ms(engine, 7, 4, repeats)
    if against:
        some = [n for n in rows if n in (1, 7, 16)]
        try:
            figures["mlx_lm"] = peer(folder, prompt, some, count, repeats)
        except Exception as error:
            print(f"mlx-lm: {type(error).__name__}: {error}")
    figures["refused"] = list(refused)
    tell(figures)
    return figures


def tell(figures: dict[str, Any]) -> None:
    plain, other = figures["decode"], figures.get("mlx_lm", {})
    forwards = other.get("forward_ms", {})
    rows = [("rows", "kind", "ms", "build", "start", "wait", "kernels", "MLX ops", "mlx-lm ms")]
    for n, kinds in figures["verify"].items():
        for name, f in kinds.items():
            parts = [f"{f[key]:.2f}" for key in ("ms", "build_ms", "start_ms", "wait_ms")]
            theirs = f"{forwards[n]:.2f}" if n in forwards else "-"
            rows.append((str(n), name, *parts, str(f["kernels"]), str(f["mlx_operations"]), theirs))
    print(table(rows))
    print(
        f"decoding: {plain['tokens_per_second']:.1f} tok/s, {plain['ms']:.2f} ms a token "
        f"(verify {plain['verify_ms']:.2f}, commit {plain['commit_ms']:.2f}), {plain['kernels']} "
        f"kernels and {plain['mlx_operations']} MLX operations {plain['by_name']}"
    )
    print(f"round of 7 rows, 4 committed: {figures['round_7_accept_4_ms']:.2f} ms")
    if other:
        counts = other["operations"]
        print(f"mlx-lm: {other['tokens_per_second']:.1f} tok/s, {counts['mlx_operations']} ops")
        ratio = plain["tokens_per_second"] / other["tokens_per_second"]
        print(f"BAR decoding against mlx-lm: {ratio:.2f}, at least 3: {_verdict(ratio >= 3)}")
    one = figures["verify"].get(1, {}).get("chain", {}).get("ms")
    for n, most in ((7, 1.35), (16, 1.8)):
        for name, f in figures["verify"].get(n, {}).items():
            # decoding begins its next pass early, so its step is shorter than a pass by itself
            ratio = f["ms"] / plain["ms"]
            alone = f"{f['ms'] / one:.2f} of one row's pass, " if one else ""
            print(
                f"BAR {n} rows, {name}: {alone}{ratio:.2f} of a step of decoding, at most {most}: "
                f"{_verdict(ratio <= most)}"
            )
    for words in figures["refused"]:
        print(f"REFUSED {words}")


def _verdict(met: bool) -> str:
    return "met" if met else "NOT MET"
