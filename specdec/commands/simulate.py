"""`specdec simulate`: a routing log replayed against pins, slots and policies."""

from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.commands.console import Console, emit
from specdec.commands.options import POLICIES, Several
from specdec.errors import PlanError
from specdec.units import percent, size, table

if TYPE_CHECKING:
    from specdec.predictors import Foreseen
    from specdec.routing_log import RoutingLog
    from specdec.simulation import Outcome, Setting

PREDICTORS = ("previous", "draft", "layer")  # specdec.predictors.PREDICTORS but "off"
SHARES = (8, 4, 2)  # of all experts of unpinned layers, tried where no slots are given
RATES = ("hit_rate", "effective_hit_rate", "optimal_hit_rate", "bytes_per_token")
FORESEEN_RATES = ("hit_rate", "precision", "recall", "coverage", "waste", "bytes_per_token")
GB = 1_000_000_000


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
@click.option(
    "--prefetch",
    type=Several("predictor", click.Choice(PREDICTORS)),
    metavar="LIST",
    help=f"Also replay guesses of the next experts: some of {', '.join(PREDICTORS)}.",
)
@click.option("--json", "json_path", metavar="FILE", help="Write all figures to FILE.")
@click.option("--quiet", "-q", is_flag=True, help="Print the result, on stderr only problems.")
def simulate(**options: Any) -> None:
    """Say what pins, slots and policies would have done for a run.

    LOG is what --collect-routing wrote. Hits, misses and bytes are those that a run of the same
    tokens would have with the setting; "optimal" is the hit rate of evicting with knowledge of the
    future, which no policy beats. Reads ahead of need are left out but for --prefetch: what they
    would bring with a disk that is always in time. Its baseline, "previous", is the experts of the
    last token again.
    """
    console = Console(options["quiet"])
    policies = options["policy"].split(",") if options["policy"] is not None else None
    for policy in policies or ():
        if policy not in POLICIES:
            raise click.UsageError(f"--policy {policy}: expected some of {', '.join(POLICIES)}.")

    from specdec import record
    from specdec.routing_log import RoutingLog

    with record.JsonFile(options["json_path"]) as file:
        log = RoutingLog.read(Path(options["log"]))
        file.write(_simulate(log, policies, options, console))


def _simulate(
    log: "RoutingLog", policies: list[str] | None, options: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Replay and print; what the JSON says of it."""
    from specdec import __version__, record, simulation
    from specdec.predictors import foresee
    from specdec.trace import Trace

    trace, head = Trace.of(log), log.header
    protect = head.protect[0], head.protect[1]
    like = simulation.Setting(len(head.pinned), max(head.slots, 1), head.policy, protect, head.rows)
    settings = _settings(like, len(head.layers), head.experts, policies, options)
    outcomes, progress = [], console.progress("simulating:")
    for at, one in enumerate(settings):
        outcomes.append(simulation.simulate(trace, one))
        progress(at + 1, len(settings))
    found, cap = None, int((options["memory_gb"] or 0) * GB)
    if options["memory_gb"] is not None:
        room = cap - head.fixed_bytes
        if room <= 0:
            raise PlanError(
                f"--memory-gb {options['memory_gb']:g}: the run took {size(head.fixed_bytes)} "
                "without experts"
            )
        progress = console.progress("trying pins:")
        found = simulation.best(trace, room, policies or POLICIES, like, progress)
    foreseen: list[Foreseen] = []
    if options["prefetch"]:
        progress = console.progress("foreseeing:")
        some = settings if options["slots"] else [s for s in settings if s.slots == like.slots]
        tried = list(product(some, ("off", *options["prefetch"])))
        for at, (one, predictor) in enumerate(tried):
            foreseen.append(foresee(log, one, predictor))
            progress(at + 1, len(tried))
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
    if foreseen:
        emit(f"\nexperts read ahead, always in time:\n{_foreseen_table(foreseen)}")
    return {
        "schema": record.SCHEMA,
        "kind": "simulate",
        "specdec": __version__,
        "settings": options,
        "log": asdict(head) | {"passes": trace.passes, "requests": len(trace.asks)},
        "tokens": trace.tokens,
        "outcomes": [_json(one, RATES) for one in outcomes],
        "best": None if found is None else _json(found, RATES),
        "prefetch": [_json(one, FORESEEN_RATES) for one in foreseen],
    }


def _settings(
    like: "Setting",
    layers: int,
    experts: int,
    policies: list[str] | None,
    options: dict[str, Any],
) -> "list[Setting]":
    """What to try; what is not asked for is as the logged run had it."""
    settings = []
    for pins, policy in product(options["pins"] or (like.pins,), policies or (like.policy,)):
        every = max(layers - pins, 0) * experts
        slots = options["slots"] or sorted({like.slots, *(max(1, every // n) for n in SHARES)})
        settings += [replace(like, pins=pins, slots=many, policy=policy) for many in slots]
    return settings


def _json(one: "Outcome | Foreseen", rates: tuple[str, ...]) -> dict[str, Any]:
    """Its counts, its setting beside them, and its rates."""
    fields = asdict(one)
    return fields.pop("setting") | fields | {rate: getattr(one, rate) for rate in rates}


def _foreseen_table(foreseen: "list[Foreseen]") -> str:
    rows: list[tuple[str, ...]] = [
        (
            *("pins", "slots", "policy", "prefetch", "hit rate", "precision", "recall"),
            *("covered", "wasted", "read/token"),
        )
    ]
    for one in foreseen:
        setting, each = one.setting, one.bytes_per_token
        rates = one.hit_rate, one.precision, one.recall, one.coverage, one.waste
        rows.append(
            (
                *(str(setting.pins), str(setting.slots), setting.policy, one.predictor),
                *map(percent, rates),
                "-" if each is None else size(each),
            )
        )
    return table(rows, left=(2, 3))


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
