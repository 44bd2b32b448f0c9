"""`specdec bench`: a sweep over prompts, temperatures, contexts and budgets; tables and JSON."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.commands.budgets import NodesOrAuto, max_budget_option, planned
from specdec.commands.console import Console, emit
from specdec.commands.options import (
    Several,
    kernels_option,
    model_options,
    routing_options,
    tree_option,
)
from specdec.commands.sampling import sampling, sampling_options
from specdec.errors import DisagreementError, SpecdecError

if TYPE_CHECKING:
    from specdec.bench import Run, Sweep
    from specdec.peer import PeerRun

BUDGETS = (1, 2, 4, 6, 12)
PEERS = ("mlx-lm",)


@click.command()
@model_options
@click.option(
    "--prompts",
    metavar="FILE",
    help='JSON lines {"id", "class", "prompt"}.  [default: the prompts of the demo pair, of '
    "classes code, prose, mathematics and chat]",
)
@click.option(
    "--classes",
    type=Several("class", click.STRING),
    help="Classes of prompts to run.  [default: all]",
)
@click.option(
    "--contexts",
    type=Several("context length", click.IntRange(min=1)),
    help="Lengths in tokens that prompts are brought to: cut at the front, or led by other "
    "prompts of the file.  [default: as they are]",
)
@click.option(
    "--budgets",
    type=Several("budget", NodesOrAuto()),
    help="Budgets to run, numbers or auto.  "
    f"[default: {','.join(map(str, BUDGETS))}; with --against 1]",
)
@max_budget_option
@sampling_options(default_seed=0, several=True)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Runs of each prompt at each budget; the median counts.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Token limit."
)
@tree_option
@kernels_option
@click.option("--raw", is_flag=True, help="No chat template for prompts of class chat either.")
@click.option("--ignore-eos", is_flag=True, help="Do not end at the model's end tokens.")
@click.option(
    "--against",
    type=click.Choice(PEERS),
    help="After each run of budget 1, have this engine do the same, and compare.",
)
@click.option(
    "--json", "json_path", metavar="FILE", help="Write all figures to FILE, as each run ends."
)
@click.option(
    "--resume", is_flag=True, help="Keep the runs that the --json file has, and make the others."
)
@routing_options
@click.option("--quiet", "-q", is_flag=True, help="Print the report, and on stderr only problems.")
def bench(**options: Any) -> None:
    """Sweep prompts and budgets: speed, acceptance, and whether all budgets emit the same tokens.

    The report goes to stdout. Prompts are continued as they are; those of class chat are put into
    the model's chat template where it has one.
    """
    _check(options)
    console = Console(options["quiet"])
    largest = planned(options["budgets"], options["max_budget"], console)
    chosen = sampling({**options, "temp": max(options["temps"])}, console, largest)

    from specdec import bench_resume, record
    from specdec.bench import sweep
    from specdec.bench_grid import Grid
    from specdec.bench_record import SweepFile
    from specdec.bench_table import report
    from specdec.commands import bench_parts, session
    from specdec.peer_match import peer_report
    from specdec.prompts import of_classes
    from specdec.report import memory_line
    from specdec.routing_writer import RoutingWriter

    everything = bench_parts.prompts(options)
    grid = Grid(
        of_classes(everything, options["classes"]) if options["classes"] else everything,
        options["budgets"],
        options["repeat"],
        options["temps"],
        options["contexts"] or (None,),
        chosen.same_for_every_budget,
    )
    path = Path(options["json_path"] or "")
    with (
        record.JsonFile(options["json_path"]) as file,
        RoutingWriter(options["collect_routing"]) as routing,
    ):
        earlier = bench_resume.read(path) if options["resume"] else None
        tokenizer, config = session.door(options)
        tokens = bench_parts.tokens(options, everything, grid, tokenizer, config, console)
        about = bench_parts.about(options, grid, tokens)
        freed = bench_parts.kept_by_mlx()
        eos_ids = () if options["ignore_eos"] else tokenizer.eos_ids
        longest = max(map(len, tokens.values()))
        context = longest + options["max_tokens"]
        loaded = session.load(options, longest, context, largest, console, tokenizer)
        routing.begin(loaded, options["cache_tolerance"])
        warmed = session.warm(options, loaded, console)
        uses = session.count_uses(options, loaded)

        def head() -> dict[str, Any]:
            memory = session.memory(loaded.plan)
            return (
                record.head("bench", options, loaded.backend, loaded.plan, memory, warmed) | about
            )

        kept: tuple[list[Run], list[PeerRun]] = ([], [])
        if earlier is not None:
            kept = bench_resume.kept(earlier, head(), grid)
            console.say(f"kept from {path}: {len(kept[0])} of {grid.planned} runs")
        elif options["resume"]:
            console.note(f"note: --resume: there is no {path} yet; every run is made")
        peer = bench_parts.peer(options, loaded, freed, console)
        written = SweepFile(file, tokenizer, head)

        def on_run(so_far: "Sweep", one: "Run | PeerRun") -> None:
            written.write(so_far)
            console.say(bench_parts.line(so_far, one))

        done = sweep(
            bench_parts.runner(options, loaded, tokens, chosen, eos_ids),
            grid,
            on_run,
            *kept,
            compete=bench_parts.competitor(peer, tokens),
        )
        session.save_uses(options, uses)
        emit(report(done))
        if peer is not None and done.peer:
            emit("\n" + peer_report(done, peer.version))
        else:
            console.say(f"memory: {memory_line(session.memory(loaded.plan))}")
        if not isinstance(done.ended, SpecdecError):
            written.write(done)
    if done.ended is not None:
        raise done.ended
    # With a tolerance runs may differ, and the report says so.
    if (differing := done.disagreements()) and not options["cache_tolerance"]:
        names = ", ".join(map(done.label, differing))
        raise DisagreementError(f"tokens differ between runs of: {names}")


def _check(options: dict[str, Any]) -> None:
    """Refuse options that contradict each other, before any work; fill in the budgets."""
    if options["budgets"] is None:
        options["budgets"] = (1,) if options["against"] else BUDGETS
    if options["model"] is not None and options["draft"] is None and options["budgets"] != (1,):
        raise click.UsageError("budgets above 1 need a draft: give --draft, or --budgets 1.")
    if options["resume"] and options["json_path"] is None:
        raise click.UsageError("--resume needs --json, the file whose runs are kept.")
    for name in ("collect_routing", "save_warm"):
        if options["resume"] and options[name] is not None:
            raise click.UsageError(
                f"--resume and --{name.replace('_', '-')} exclude each other: it would know "
                "nothing of the runs that are kept."
            )
    if options["against"]:
        if 1 not in options["budgets"]:
            raise click.UsageError("--against compares plain decoding: add 1 to --budgets.")
        if options["temps"] != (0.0,) or options["repetition_penalty"] != 1.0:
            raise click.UsageError(
                "--against compares greedy decoding: leave out --temps and --repetition-penalty."
            )
        if options["cache_tolerance"]:
            raise click.UsageError(
                "--against compares exact decoding: leave out --cache-tolerance."
            )
