"""`specdec repack`: a model folder whose experts lie as streaming reads them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.commands.console import Console, emit

if TYPE_CHECKING:
    from specdec.target.expert_store import ExpertStore


@click.command()
@click.argument("model")
@click.argument("out")
@click.option(
    "--cluster",
    metavar="FILE",
    help="Order experts by which are used together, as this routing log has it.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print the result, on stderr only problems.")
def repack(**options: Any) -> None:
    """Write MODEL once more to the folder OUT, experts in one aligned file per layer.

    MODEL is a folder or a Hugging Face repository; OUT is then a model like any other, complete.
    The same command run again finishes a repack that was cut off. With --cluster, what the order
    gained is judged on the half of the log that it was not learnt from.
    """
    console = Console(options["quiet"])

    from specdec.checkpoint import Checkpoint
    from specdec.errors import RepackError
    from specdec.hub import resolve
    from specdec.repack import repack as run
    from specdec.target.config import TargetConfig
    from specdec.target.expert_store import ExpertStore
    from specdec.target.repacked_index import is_repacked
    from specdec.units import size

    folder, out = resolve(options["model"]), Path(options["out"])
    if is_repacked(folder):
        raise RepackError(f"{folder}: is repacked already; repack the model that it was made from")
    with Checkpoint.open(folder) as checkpoint:
        store = ExpertStore(checkpoint, TargetConfig.of(checkpoint))
        places, order = None, "identity"
        if options["cluster"] is not None:
            places, order = _clustered(Path(options["cluster"]), store, console)
        done = run(checkpoint, store, out, places, order, console.progress("repacking:"))
    each = {layer.stride for layer in done.index.layers}
    emit(
        f"{out}: {len(done.index.layers)} layers of {store.num_experts} experts, "
        f"{' or '.join(size(one) for one in sorted(each))} each; {size(done.written)} written"
        + (f", {len(done.kept)} files of an earlier run kept" if done.kept else "")
    )


def _clustered(
    path: Path, store: "ExpertStore", console: Console
) -> tuple[dict[int, tuple[int, ...]], str]:
    """Places by a routing log, and the order's name; what it gained is told."""
    from specdec.cluster import cluster, report
    from specdec.durable import sha256_of
    from specdec.errors import RoutingLogError
    from specdec.routing_log import RoutingLog

    log = RoutingLog.read(path)
    log.header.check(path, store.layers, store.num_experts)
    try:
        done = cluster(log, console.progress("ordering:"))
    except RoutingLogError as error:
        raise RoutingLogError(f"{path}: {error}") from error
    for line in report(done):
        emit(line)
    digest = sha256_of(path, RoutingLogError)
    return dict(done.places), f"clustered by routing log sha256 {digest}"
