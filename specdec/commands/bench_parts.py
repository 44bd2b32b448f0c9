"""What `specdec bench` puts together: prompts, their tokens, who runs them, who competes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from specdec import generation
from specdec.bench import Run, Sweep
from specdec.bench_grid import Cell, Grid
from specdec.bench_record import fingerprint, prompts_json
from specdec.commands import session
from specdec.commands.console import Console
from specdec.demo_pair import PROMPTS, WRITTEN
from specdec.errors import PlanError, PromptError
from specdec.generation import Request, Result, check_prompt
from specdec.load import Loaded, folders
from specdec.memory import physical_memory
from specdec.peer import NAME, Peer, PeerRun, peer_version
from specdec.prompt_tokens import PromptTokens
from specdec.prompts import Prompt, read_prompts
from specdec.sampling import Sampling
from specdec.target.config import TargetConfig
from specdec.tokenizer import Tokenizer
from specdec.units import number, size

Options = Mapping[str, Any]
Tokens = Mapping[tuple[str, int | None], tuple[int, ...]]
"""(prompt id, context) -> the tokens to run."""


def prompts(options: Options) -> tuple[Prompt, ...]:
    """The prompts of the file that was named, or of the package's own."""
    if options["prompts"] is not None:
        return read_prompts(Path(options["prompts"]))
    return read_prompts(PROMPTS) + read_prompts(WRITTEN)


def tokens(
    options: Options,
    everything: tuple[Prompt, ...],
    grid: Grid,
    tokenizer: Tokenizer,
    config: TargetConfig,
    console: Console,
) -> Tokens:
    """PromptError for what the model's context cannot hold.

    everything: the prompts of the file, also those of classes that are not run.
    """
    texts = PromptTokens(everything, tokenizer, options["raw"])
    longest = max(options["contexts"] or (0,))
    if longest and longest + options["max_tokens"] > config.max_position:
        raise PromptError(
            f"--contexts {longest} with --max-tokens {options['max_tokens']} is "
            f"{longest + options['max_tokens']} tokens; the model's context is "
            f"{config.max_position}"
        )
    if longest > texts.longest_without_repeats:
        console.note(
            f"note: all prompts together have {texts.longest_without_repeats} tokens: a context "
            f"of {longest} repeats them"
        )
    found = {}
    for prompt in grid.prompts:
        for context in grid.contexts:
            found[prompt.id, context] = texts.of(prompt, context)
            try:
                check_prompt(found[prompt.id, context], config)
            except PromptError as error:
                raise PromptError(f"prompt {prompt.id!r}: {error}") from error
    return found


def about(options: Options, grid: Grid, encoded: Tokens) -> dict[str, Any]:
    """What a document says of models and prompts: enough to tell whether others were the same."""
    target, draft = folders(session.settings(options, 1, 1))
    models = {"target": fingerprint(target)}
    if draft is not None:
        models["draft"] = fingerprint(draft)
    found = {"models": models, "prompts": prompts_json(grid, encoded)}
    return found | ({"peer_version": peer_version()} if options["against"] else {})


def runner(
    options: Options, loaded: Loaded, encoded: Tokens, chosen: Sampling, eos_ids: tuple[int, ...]
) -> Callable[[Cell], Result]:
    """What makes one run of a cell; KeyboardInterrupt where it was interrupted."""

    def run(cell: Cell) -> Result:
        accept = chosen.accept if cell.temperature else "match"
        request = Request(
            prompt_tokens=encoded[cell.prompt.id, cell.context],
            budget=cell.budget,
            tree=options["tree"],
            max_tokens=options["max_tokens"],
            eos_ids=eos_ids,
            sampling=replace(chosen, temperature=cell.temperature, accept=accept),
            max_budget=options["max_budget"],
        )
        result = generation.generate(loaded.engine, loaded.tokenizer, request)
        if result.finish == "interrupted":
            raise KeyboardInterrupt
        return result

    return run


def peer(options: Options, loaded: Loaded, kept_bytes: int, console: Console) -> Peer | None:
    """The engine of --against, loaded beside ours; None without the option.

    kept_bytes: of freed memory that MLX keeps by itself. PlanError where both do not fit.
    """
    if options["against"] is None:
        return None
    folder, _ = folders(session.settings(options, 1, 1))
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    console.note(
        f"note: {NAME} holds the whole model in this process, {size(whole)} or more beside the plan"
    )
    if loaded.plan.total + whole > physical_memory():
        raise PlanError(
            f"--against {NAME}: it needs {size(whole)} beside the {size(loaded.plan.total)} of the "
            f"plan; this machine has {size(physical_memory())}"
        )
    return Peer(folder, loaded.backend.dtype, kept_bytes)


def competitor(found: Peer | None, encoded: Tokens) -> Callable[[Run], PeerRun] | None:
    """What lets the peer do what a run of ours did; its first run of all is not timed."""
    if found is None:
        return None
    warm = False

    def compete(run: Run) -> PeerRun:
        nonlocal warm
        ids = encoded[run.cell.prompt.id, run.cell.context]
        if not warm:
            found.run(run.cell.task, run.repeat, ids, run.tokens)
            warm = True
        return found.run(run.cell.task, run.repeat, ids, run.tokens)

    return compete


def kept_by_mlx() -> int:
    """Bytes of freed memory that MLX keeps for reuse, before a load limits them."""
    limit = mx.set_cache_limit(0)  # the one way to read it
    mx.set_cache_limit(limit)
    return limit


def line(so_far: Sweep, one: Run | PeerRun) -> str:
    """A run in a line, as it ends."""
    speed = one.metrics if isinstance(one, Run) else one
    who = f"budget {one.cell.budget}" if isinstance(one, Run) else NAME
    task = one.cell.task if isinstance(one, Run) else one.task
    return (
        f"repeat {one.repeat + 1}/{so_far.grid.repeats}  {so_far.label(task)}  {who}: "
        f"{number(speed.decode_tokens_per_second)} tok/s"
    )
