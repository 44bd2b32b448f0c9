"""A loaded pair for a command: what can be refused before loading, the plan, the progress."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.commands.console import Console
from specdec.metrics import Memory, peak_process_bytes
from specdec.units import size, table

if TYPE_CHECKING:
    from specdec.hot_set import Warmed
    from specdec.load import Loaded, Settings
    from specdec.plan import MemoryPlan
    from specdec.target.config import TargetConfig
    from specdec.tokenizer import Tokenizer
    from specdec.use_counter import UseCounter


def settings(
    options: Mapping[str, Any], context: int, budget: int, prompt: int | None = None
) -> "Settings":
    """The load settings among a command's options."""
    from specdec.load import Settings
    from specdec.target.streaming import Streaming

    return Settings(
        model=options["model"],
        draft=options["draft"],
        pin_layers=options["pin_layers"],
        cache_slots=options["cache_slots"],
        memory_gb=options["memory_gb"],
        prefill_chunk=options["prefill_chunk"],
        context=context,
        budget=budget,
        prompt=prompt,
        kernels=options.get("kernels"),
        threads=options.get("threads"),
        cache_tolerance=options.get("cache_tolerance") or 0.0,
        timing=options.get("timing", False),
        streaming=Streaming(
            direct=options["io"] == "direct",
            queue_depth=options["queue_depth"],
            policy=options["policy"],
            protect=options["protect"],
            prefetch=options["prefetch"],
            prefetch_bytes=_prefetch_bytes(options),
        ),
    )


def _prefetch_bytes(options: Mapping[str, Any]) -> int | None:
    if options["prefetch_mb"] is None:
        return None
    if options["prefetch"] == "off":
        raise click.UsageError("--prefetch-mb is of no use with --prefetch off.")
    return max(1, int(options["prefetch_mb"] * 1e6))


def door(options: Mapping[str, Any]) -> "tuple[Tokenizer, TargetConfig]":
    """What prompts are checked with before anything is loaded."""
    from specdec.load import folders
    from specdec.shards import read_json
    from specdec.target.config import TargetConfig
    from specdec.tokenizer import Tokenizer

    _check_files(options)
    target, _ = folders(settings(options, 1, 1))
    path = target / "config.json"
    config = TargetConfig.from_dict(read_json(path), str(path))
    return Tokenizer.open(target), config


def _check_files(options: Mapping[str, Any]) -> None:
    """Files that are read or written only after loading are looked at before."""
    if options.get("warm") is not None:
        from specdec.hot_set import HotSet

        HotSet.read(Path(options["warm"]))
    if options.get("save_warm") is not None:
        from specdec.use_counter import check_writable

        check_writable(Path(options["save_warm"]))


def load(
    options: Mapping[str, Any],
    prompt: int,
    context: int,
    budget: int,
    console: Console,
    tokenizer: "Tokenizer",
) -> "Loaded":
    """Load the pair for prompts of `prompt` tokens; the plan is printed before.

    tokenizer: as `door` opened it.
    """
    from specdec.load import load as load_pair

    loaded = load_pair(
        settings(options, context, budget, prompt),
        on_plan=lambda plan: console.say(plan_text(plan)),
        on_progress=console.progress("loading pinned experts:"),
        tokenizer=tokenizer,
    )
    if not loaded.backend.exact:
        console.note(
            "note: on this device MLX's own operations compute one row and several rows with "
            "different kernels; the tokens may differ from those of --budget 1 (--compare tells)"
        )
    if options["threads"] is not None and loaded.backend.name != "cpu":
        console.note(f"note: --threads is for the cpu kernels, not for {loaded.backend.name}")
    if options.get("cache_tolerance"):
        console.note(
            f"note: --cache-tolerance {options['cache_tolerance']:g}: routing prefers experts in "
            "memory; the output is NOT EXACT and depends on the cache, the budget and the past"
        )
    slots = loaded.engine.draft.config.slots if loaded.engine.draft is not None else 0
    if options.get("tree") == "chain" and 1 <= slots < budget:
        console.note(f"note: a chain has at most {slots} nodes, the slots of this draft's block")
    return loaded


def warm(options: Mapping[str, Any], loaded: "Loaded", console: Console) -> "Warmed | None":
    """Preload the experts that --warm names most; what it took, None without the option."""
    if options["warm"] is None:
        return None
    from specdec.hot_set import HotSet

    path, cache = Path(options["warm"]), loaded.engine.target.experts
    hot = HotSet.read(path)
    hot.check(path, cache)
    done = hot.warm(cache, console.progress("warming slots:"))
    done = replace(done, tokens=hot.teach(loaded.engine.target.prefetcher))
    table = f"; routing table of {done.tokens} tokens" if done.tokens else ""
    console.say(
        f"warmed {done.experts} of {done.named} experts named, {size(done.bytes_read)} in "
        f"{done.seconds:.2f} s{table}"
    )
    return done


def count_uses(options: Mapping[str, Any], loaded: "Loaded") -> "UseCounter | None":
    """Count the experts' uses for --save-warm from now on; None without the option."""
    if options["save_warm"] is None:
        return None
    from specdec.use_counter import UseCounter

    return UseCounter(loaded.engine.target)


def save_uses(options: Mapping[str, Any], uses: "UseCounter | None") -> None:
    """Write what was counted."""
    if uses is not None:
        uses.hot_set().save(Path(options["save_warm"]))


def plan_text(plan: "MemoryPlan") -> str:
    """The memory plan as a table."""
    return "memory plan\n" + table(plan.rows(), left=(0, 2))


def memory(plan: "MemoryPlan") -> Memory:
    """Peak memory so far, beside the plan."""
    import mlx.core as mx

    return Memory(peak_process_bytes(), mx.get_peak_memory(), plan.total)
