"""`specdec repack`: a model folder whose experts lie as streaming reads them."""

from pathlib import Path
from typing import Any

import click

from specdec.commands.console import Console, emit


@click.command()
@click.argument("model")
@click.argument("out")
@click.option("--quiet", "-q", is_flag=True, help="Print the result, on stderr only problems.")
def repack(**options: Any) -> None:
    """Write MODEL once more to the folder OUT, experts in one aligned file per layer.

    MODEL is a folder or a Hugging Face repository; OUT is then a model like any other, complete.
    The same command run again finishes a repack that was cut off.
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
        progress = console.progress("repacking:")
        done = run(checkpoint, store, out, on_progress=progress)
    each = {layer.stride for layer in done.index.layers}
    emit(
        f"{out}: {len(done.index.layers)} layers of {store.num_experts} experts, "
        f"{' or '.join(size(one) for one in sorted(each))} each; {size(done.written)} written"
        + (f", {len(done.kept)} files of an earlier run kept" if done.kept else "")
    )
