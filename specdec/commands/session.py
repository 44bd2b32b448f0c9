"""A loaded model pair, with its plan and progress told on the way."""

from typing import TYPE_CHECKING, Any

from specdec.commands.console import Console
from specdec.metrics import Memory, peak_process_bytes
from specdec.units import table

if TYPE_CHECKING:
    from specdec.load import Loaded, Settings
    from specdec.plan import MemoryPlan


def settings(options: dict[str, Any], context: int, budget: int) -> "Settings":
    """The load settings among a command's options."""
    from specdec.load import Settings

    return Settings(
        model=options["model"],
        draft=options["draft"],
        pin_layers=options["pin_layers"],
        cache_slots=options["cache_slots"],
        memory_gb=options["memory_gb"],
        prefill_chunk=options["prefill_chunk"],
        context=context,
        budget=budget,
    )


def load(options: dict[str, Any], context: int, budget: int, console: Console) -> "Loaded":
    """Load the pair; the plan is printed before."""
    from specdec.load import load as load_pair

    return load_pair(
        settings(options, context, budget),
        on_plan=lambda plan: console.say(plan_text(plan)),
        on_progress=console.progress("loading"),
    )


def plan_text(plan: "MemoryPlan") -> str:
    """The memory plan as a table."""
    return "memory plan\n" + table(plan.rows(), left=(0, 2))


def memory(plan: "MemoryPlan") -> Memory:
    """Peak memory so far, beside the plan."""
    import mlx.core as mx

    return Memory(peak_process_bytes(), mx.get_peak_memory(), plan.total)
