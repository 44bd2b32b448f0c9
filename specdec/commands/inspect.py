"""`specdec inspect`: what a target is, how it is packed, and what it would take to run it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from specdec.commands.console import emit
from specdec.commands.options import MAX_BUDGET, memory_options
from specdec.units import size, table

if TYPE_CHECKING:
    from specdec.kernels.array import Backend


@click.command()
@click.argument("model", required=False)
@click.option("--draft", metavar="PATH|REPO", help="Plan for this draft too.")
@memory_options
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Tokens to plan for, prompt and answer.",
)
@click.option(
    "--budget",
    type=click.IntRange(1, MAX_BUDGET),
    default=6,
    show_default=True,
    help="Tree nodes to plan for.",
)
@click.option(
    "--verify", is_flag=True, help="Of a repacked folder: read every byte and compare its hash."
)
def inspect(**options: Any) -> None:
    """Print a target's architecture, the size and packing of its parts, and its memory plan.

    MODEL is a folder or a Hugging Face repository; without it, the demo pair. Reads headers only,
    unless --verify is given. A repacked folder is checked against its index.
    """
    from specdec.checkpoint import Checkpoint
    from specdec.commands import repacked as repacked_folder
    from specdec.commands import session
    from specdec.inspection import architecture, parameters, parts
    from specdec.kernels.array import choose_backend
    from specdec.load import folders, plan_for
    from specdec.target.config import TargetConfig

    settings = session.settings(options, options["context"], options["budget"])
    folder, _ = folders(settings)
    index, words = repacked_folder.check(folder, options["verify"])
    with Checkpoint.open(folder) as checkpoint:
        config = TargetConfig.of(checkpoint)
        found = parts(checkpoint, config, index)
        count = parameters(checkpoint, config, index)
        backend = choose_backend()
        rows = [
            ("model", str(folder)),
            *words,
            *architecture(config),
            ("parameters", f"{count / 1e6:,.1f} M"),
            ("runs on", f"{backend.name} kernels{_threads(backend, options)}: {backend.why}"),
            ("exact", "yes" if backend.exact else "not known: rows may depend on their company"),
        ]
        emit("\n".join(f"{subject:<14}{words}" for subject, words in rows))
    emit("")
    lines = [("part", "tensors", "on disk", "matrices")]
    for part in found:
        packings = "; ".join(f"{many} x {how}" for how, many in part.packings)
        lines.append((part.name, str(part.tensors), size(part.nbytes), packings))
    lines.append(("total", "", size(sum(part.nbytes for part in found)), ""))
    emit(table(lines, left=(0, 3)))
    emit("")
    emit(session.plan_text(plan_for(settings)))


def _threads(backend: "Backend", options: Mapping[str, Any]) -> str:
    """How many compute, where that can be chosen."""
    if backend.name != "cpu":
        return ""
    from specdec.cores import default_threads

    count = options["threads"] or default_threads()
    return f", {count} threads" if count > 1 else ", 1 thread"
