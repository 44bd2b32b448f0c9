"""`specdec simulate`: a routing log replayed against pins, slots and policies."""

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.commands.console import Console, emit
from specdec.commands.options import POLICIES
from specdec.errors import PlanError
from specdec.units import percent, size, table

if TYPE_CHECKING:
    from specdec.simulation import Outcome

SHARES = (8, 4, 2)  # of all experts of unpinned layers, tried where no slots are given


class Counts(click.ParamType):
    """A comma-separated list of whole numbers from a least one on."""

    name = "LIST"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        one = click.IntRange(self.least)
        return tuple(one.convert(part.strip(), param, ctx) for part in value.split(","))


@click.command()
@click.argument("log")
@click.option("--slots", type=Counts(1), help="Slots to try.  [default: the run's; 1/8, 1/4, 1/2]")
@click.option("--pins", type=Counts(0), help="Pinned layers to try.  [default: the run's]")
@click.option("--policy", metavar="LIST", help=f"Of {', '.join(POLICIES)}.  [default: the run's]")
@click.option(
    "--memory-gb",
    type=click.FloatRange(min=0, max=1e6, min_open=True),
    metavar="GB",
    help="Also find the setting that reads the least under this cap.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print the result, on stderr only problems.")
def simulate(**options: Any) -> None:
    """Say what pins, slots and policies would have done for a run.

    LOG is what --collect-routing wrote. Hits, misses and bytes are those that a run of the same
    tokens would have with the setting; "optimal" is the hit rate of evicting with knowledge of the
    future, which no policy beats. Reads ahead of need (--prefetch) are left out.
    """
    console = Console(options["quiet"])
    policies = options["policy"].split(",") if options["policy"] is not None else None
    for policy in policies or ():
        if policy not in POLICIES:
            raise click.UsageError(f"--policy {policy}: expected some of {', '.join(POLICIES)}.")

    from specdec import simulation
    from specdec.load import GB
    from specdec.routing_log import RoutingLog
    from specdec.trace import Trace

    trace = Trace.of(RoutingLog.read(Path(options["log"])))
    head = trace.header
    protect = head.protect[0], head.protect[1]
    like = simulation.Setting(len(head.pinned), max(head.slots, 1), head.policy, protect, head.rows)
    outcomes = []
    settings = list(product(options["pins"] or (like.pins,), policies or (like.policy,)))
    for at, (pins, policy) in enumerate(settings):
        every = max(len(head.layers) - pins, 0) * head.experts
        slots = options["slots"] or sorted({like.slots, *(max(1, every // n) for n in SHARES)})
        for many in slots:
            one = simulation.Setting(pins, many, policy, like.protect, like.rows)
            outcomes.append(simulation.simulate(trace, one))
        console.progress("simulating:")(at + 1, len(settings))
    found = None
    if options["memory_gb"] is not None:
        cap = int(options["memory_gb"] * GB)
        room = cap - head.fixed_bytes
        if room <= 0:
            raise PlanError(
                f"--memory-gb {options['memory_gb']:g}: the run took {size(head.fixed_bytes)} "
                "without experts"
            )
        progress = console.progress("trying pins:")
        found = simulation.best(trace, room, policies or POLICIES, like, progress)
    emit(
        f"{head.model}: {trace.passes} passes, {trace.tokens} tokens, {len(trace.asks)} requests "
        f"of {len(head.layers)} layers of {head.experts} experts"
    )
    if head.tolerance:
        emit(f"NOT EXACT: routed with --cache-tolerance {head.tolerance:g}")
    emit(_table(outcomes))
    if found is not None:
        emit(f"\nbest within {size(cap)}:\n{_table([found])}")
        best = found.setting
        emit(f"--pin-layers {best.pins} --cache-slots {max(best.slots, 1)} --policy {best.policy}")


def _table(outcomes: "list[Outcome]") -> str:
    rows = [("pins", "slots", "policy", "hit rate", "with pinned", "optimal", "read/token")]
    for one in outcomes:
        each = one.bytes_per_token
        rows.append(
            (
                str(one.setting.pins),
                str(one.setting.slots),
                one.setting.policy,
                percent(one.hit_rate),
                percent(one.effective_hit_rate),
                percent(one.optimal_hit_rate),
                "-" if each is None else size(each),
            )
        )
    return table(rows, left=(2,))
