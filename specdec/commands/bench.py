"""`specdec bench`: a sweep over prompts and budgets, as a table and as JSON."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.commands.console import Console, emit
from specdec.commands.options import (
    Budgets,
    kernels_option,
    model_options,
    routing_options,
    tree_option,
)
from specdec.errors import DisagreementError, PromptError, SpecdecError

if TYPE_CHECKING:
    from specdec.bench import Run
    from specdec.generation import Result
    from specdec.prompts import Prompt


@click.command()
@model_options
@click.option(
    "--prompts",
    metavar="FILE",
    help='JSON lines {"id", "class", "prompt"}.  [default: the held-out prompts of the demo pair]',
)
@click.option(
    "--budgets", type=Budgets(), default="1,2,4,6,12", show_default=True, help="Budgets to run."
)
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
@click.option("--ignore-eos", is_flag=True, help="Do not end at the model's end tokens.")
@click.option("--json", "json_path", metavar="FILE", help="Write all figures to FILE.")
@routing_options
@click.option("--quiet", "-q", is_flag=True, help="Print the report, and on stderr only problems.")
def bench(**options: Any) -> None:
    """Sweep prompts and budgets: speed, acceptance, and whether all budgets emit the same tokens.

    The report goes to stdout. Prompts are used as they are, without the chat template.
    """
    if options["model"] is not None and options["draft"] is None and max(options["budgets"]) > 1:
        raise click.UsageError("budgets above 1 need a draft: give --draft, or --budgets 1.")
    console = Console(options["quiet"])

    from specdec import bench as benchmark
    from specdec import record
    from specdec.commands import session
    from specdec.demo_pair import PROMPTS
    from specdec.generation import Request, check_prompt, generate
    from specdec.prompts import read_prompts
    from specdec.report import memory_line
    from specdec.routing_writer import RoutingWriter

    options["prompts"] = options["prompts"] or str(PROMPTS)
    prompts = read_prompts(Path(options["prompts"]))
    budgets: tuple[int, ...] = options["budgets"]
    with (
        record.JsonFile(options["json_path"]) as file,
        RoutingWriter(options["collect_routing"]) as routing,
    ):
        tokenizer, config = session.door(options)
        eos_ids = () if options["ignore_eos"] else tokenizer.eos_ids
        tokens = {prompt.id: tuple(tokenizer.encode(prompt.text)) for prompt in prompts}
        for name, ids in tokens.items():
            try:
                check_prompt(ids, config)
            except PromptError as error:
                raise PromptError(f"prompt {name!r}: {error}") from error
        longest = max(map(len, tokens.values()))
        context = longest + options["max_tokens"]
        loaded = session.load(options, longest, context, max(budgets), console, tokenizer)
        routing.begin(loaded, options["cache_tolerance"])
        warmed = session.warm(options, loaded, console)
        uses = session.count_uses(options, loaded)

        def run(prompt: "Prompt", budget: int) -> "Result":
            result = generate(
                loaded.engine,
                tokenizer,
                Request(
                    prompt_tokens=tokens[prompt.id],
                    budget=budget,
                    tree=options["tree"],
                    max_tokens=options["max_tokens"],
                    eos_ids=eos_ids,
                ),
            )
            if result.finish == "interrupted":
                raise KeyboardInterrupt
            return result

        def tell(one: "Run") -> None:
            speed = one.metrics.decode_tokens_per_second or 0.0
            console.say(
                f"repeat {one.repeat + 1}/{options['repeat']}  {one.prompt.id}  "
                f"budget {one.budget}: {speed:.1f} tok/s"
            )

        done = benchmark.sweep(run, prompts, budgets, options["repeat"], tell)
        session.save_uses(options, uses)
        memory = session.memory(loaded.plan)
        emit(benchmark.report(done))
        console.say(f"memory: {memory_line(memory)}")
        if not isinstance(done.ended, SpecdecError):
            head = record.head("bench", options, loaded.backend, loaded.plan, memory, warmed)
            file.write(head | record.bench(done))
    if done.ended is not None:
        raise done.ended
    # With a tolerance runs may differ, and the report says so.
    if done.disagreements() and not options["cache_tolerance"]:
        raise DisagreementError("tokens differ between runs of: " + ", ".join(done.disagreements()))
