"""`specdec doctor`: does this draft predict this target, and if not, what is wrong?"""

from typing import Any

import click

from specdec.commands.console import Console, emit
from specdec.commands.options import memory_options


@click.command()
@click.argument("model", metavar="TARGET", required=False)
@click.argument("draft", required=False)
@memory_options
@click.option(
    "--positions",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Positions of the built-in text to measure.",
)
@click.option(
    "--thorough", is_flag=True, help="Try other settings of the draft even if it predicts well."
)
@click.option("--quiet", "-q", is_flag=True, help="Print the findings, on stderr only problems.")
def doctor(**options: Any) -> None:
    """Check that a draft belongs to a target, and measure how well it predicts it.

    TARGET and DRAFT are folders or Hugging Face repositories; without them, the demo pair. The
    findings go to stdout. The exit code is 1 when the draft predicts too little.
    """
    if options["model"] is not None and options["draft"] is None:
        raise click.UsageError("a TARGET needs its DRAFT beside it.")
    console = Console(options["quiet"])

    from specdec.commands import session
    from specdec.draft.doctor import CHUNK, TEXT, examine
    from specdec.generation import check_prompt

    tokenizer, config = session.door(options)
    tokens = tokenizer.encode(TEXT)
    check_prompt(tokens, config)
    # Logits of a whole chunk are looked at, as of a tree of that many rows.
    loaded = session.load(options, len(tokens), len(tokens) + 1, CHUNK, console, tokenizer)
    engine = loaded.engine
    assert engine.draft is not None
    found = examine(
        engine.target,
        engine.draft,
        tokens,
        options["positions"],
        thorough=options["thorough"],
        on_progress=console.say,
    )
    for line in found.lines():
        emit(line)
    if not found.fits:
        raise SystemExit(1)
