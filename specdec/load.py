"""Loading: from names and limits to an engine.

Everything is checked before anything is read: headers, configs, the pairing of draft and target,
the tokenizer, and whether the memory plan fits its cap.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from specdec.checkpoint import Checkpoint
from specdec.cores import default_threads
from specdec.demo_pair import demo_pair
from specdec.draft.config import DraftConfig
from specdec.draft.model import Draft
from specdec.draft.pairing import check_pairing
from specdec.engine import Engine
from specdec.errors import PlanError
from specdec.footprint import Sizes, verify_rows
from specdec.hub import resolve
from specdec.kernels.array import Backend, choose_backend
from specdec.kernels.executor import use_gpu_kernels, use_threads
from specdec.kernels.gpu.limits import MAX_ROWS
from specdec.memory import resident_bytes, start_gpu
from specdec.plan import KEPT_BYTES, MemoryPlan, make_plan
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.expert_store import ExpertStore
from specdec.target.layer_clock import LayerClock
from specdec.target.manifest import Manifest
from specdec.target.model import Target
from specdec.target.repacked_index import is_repacked
from specdec.target.repacked_store import open_store
from specdec.target.streaming import Streaming
from specdec.target.tolerance import Tolerance
from specdec.tokenizer import Tokenizer

GB = 1_000_000_000


@dataclass(frozen=True)
class Settings:
    """What to load and what it may take.

    model, draft: a folder or a repository id; no model: the demo pair.
    pin_layers, cache_slots, memory_gb: None to let the plan decide. memory_gb in 10^9 bytes.
    context: tokens of prompt and answer together; budget: the largest that will be used. Both are
        planned for, and the engine keeps to them.
    prompt: tokens of the longest prompt, None for as many as the context holds.
    streaming: how experts are read and kept; `rows` follows from the budget.
    timing: whether every layer is timed, which slows it down.
    cache_tolerance: margin of cache-aware routing (target.tolerance), 0 for exact routing.
    kernels: the backend by its name, None for what suits the machine (see choose_backend).
    threads: those that compute the kernels of the cpu backend, of all models of the process from
        then on; None for `default_threads`.
    """

    model: str | None = None
    draft: str | None = None
    pin_layers: int | None = None
    cache_slots: int | None = None
    memory_gb: float | None = None
    prefill_chunk: int = 256
    context: int = 4096
    budget: int = 6
    prompt: int | None = None
    kernels: str | None = None
    threads: int | None = None
    cache_tolerance: float = 0.0
    streaming: Streaming = field(default_factory=Streaming)
    timing: bool = False


@dataclass(frozen=True)
class Loaded:
    """A pair ready to run."""

    engine: Engine
    tokenizer: Tokenizer
    plan: MemoryPlan
    backend: Backend


@dataclass(frozen=True)
class _Headers:
    """A checked, unread pair."""

    target: Checkpoint
    config: TargetConfig
    draft: tuple[Checkpoint, DraftConfig] | None
    store: ExpertStore
    backend: Backend


def folders(settings: Settings) -> tuple[Path, Path | None]:
    """The folders of target and draft, fetched where they are repositories."""
    if settings.model is None:
        target, draft = demo_pair()
        return target, resolve(settings.draft) if settings.draft is not None else draft
    return resolve(settings.model), resolve(settings.draft) if settings.draft else None


def plan_for(settings: Settings) -> MemoryPlan:
    """The memory plan of a load, from headers alone."""
    with ExitStack() as stack:
        return _plan(_open(settings, stack), settings)


def load(
    settings: Settings,
    on_plan: Callable[[MemoryPlan], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Loaded:
    """Check, plan, and read a pair. on_plan gets the plan before anything is read; on_progress
    counts the bytes of the pinned experts. tokenizer: the target's, where it is open already."""
    with ExitStack() as stack:
        found = _open(settings, stack)
        if tokenizer is None:
            tokenizer = Tokenizer.open(found.target.folder)
        plan = _plan(found, settings)
        use_gpu_kernels(found.backend.on_gpu)
        if found.backend.name == "cpu":
            use_threads(_threads(settings))
        if on_plan is not None:
            on_plan(plan)
        mx.set_cache_limit(KEPT_BYTES)
        backend = found.backend
        streaming = replace(_streaming(settings), rows=verify_rows(settings.budget))
        cache = ExpertCache(found.store, plan.pinned, plan.slots, backend.dtype, streaming)
        taps = found.draft[1].target_layer_ids if found.draft else ()
        target = Target.load(found.target, found.config, cache, backend, taps)
        if settings.cache_tolerance > 0:
            normalize = found.config.norm_topk_prob
            target.tolerate(Tolerance(settings.cache_tolerance, normalize, backend))
        if settings.timing:
            target.clock = LayerClock(found.config.layer_types)
        cache.load_pinned(on_progress)
        draft = None
        if found.draft is not None:
            draft = Draft.load(*found.draft, target.embedding, target.head, backend)
        # The target's files stay open for as long as experts are read from them.
        stack.pop_all()
        if found.draft is not None:
            found.draft[0].close()
    engine = Engine(
        target,
        draft,
        prefill_chunk=settings.prefill_chunk,
        context=settings.context,
        max_budget=settings.budget,
    )
    return Loaded(engine, tokenizer, plan, backend)


def _open(settings: Settings, stack: ExitStack) -> _Headers:
    target_folder, draft_folder = folders(settings)
    is_repacked(target_folder)  # refuses an unfinished one before looking for its tensors
    target = stack.enter_context(Checkpoint.open(target_folder))
    config = TargetConfig.of(target)
    draft = None
    if draft_folder is not None:
        checkpoint = stack.enter_context(Checkpoint.open(draft_folder))
        source = str(draft_folder / "config.json")
        draft = checkpoint, DraftConfig.from_dict(checkpoint.config, source)
        check_pairing(draft[1], config)
    store = open_store(target, config)
    Manifest.of(target, config)
    return _Headers(target, config, draft, store, _backend(target, config, settings.kernels))


def _backend(checkpoint: Checkpoint, config: TargetConfig, kernels: str | None) -> Backend:
    """The backend for this machine, in the checkpoint's float dtype where that is kept."""
    dtype = checkpoint.floats(f"{config.prefix}norm.weight").dtype
    return choose_backend(mx.float32 if dtype == "F32" else mx.bfloat16, kernels)


def _plan(found: _Headers, settings: Settings) -> MemoryPlan:
    memory = settings.memory_gb
    if found.backend.on_gpu and settings.budget >= MAX_ROWS:
        raise PlanError(
            f"--budget {settings.budget}: the {found.backend.name} kernels verify {MAX_ROWS} rows "
            f"at a time, a budget of {MAX_ROWS - 1} (SPECDEC_KERNELS=reference takes more, slower "
            "and not exact)"
        )
    context = min(settings.context, found.config.max_position)
    if found.backend.on_gpu:
        start_gpu()  # or what a GPU takes of the process's memory would be in no plan
    return make_plan(
        found.store,
        found.draft,
        Sizes(
            prompt=min(settings.prompt or context, context),
            context=context,
            chunk=settings.prefill_chunk,
            budget=settings.budget,
            dtype=found.backend.dtype,
            row_by_row=found.backend.name == "cpu",
            threads=_threads(settings),
        ),
        pin_layers=settings.pin_layers,
        cache_slots=settings.cache_slots,
        memory_bytes=None if memory is None else int(memory * GB),
        runtime_bytes=resident_bytes(),
        backend=found.backend.name,
        streaming=_streaming(settings),
    )


def _threads(settings: Settings) -> int:
    return settings.threads or default_threads()


def _streaming(settings: Settings) -> Streaming:
    """How experts are read and kept. What `auto` prefetches depends on the clock; cache-aware
    routing would make that the output's business."""
    how = settings.streaming
    if settings.cache_tolerance > 0 and how.prefetch == "auto":
        return replace(how, prefetch="off")
    return how
