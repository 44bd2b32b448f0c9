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
    help="Tokens the target adds to the built-in text, and which are measured.",
)
@click.option(
    "--thorough", is_flag=True, help="Try other settings of the draft even if it predicts well."
)
@click.option("--quiet", "-q", is_flag=True, help="Print the findings, on stderr only problems.")
def doctor(**options: Any) -> None:
    """Check that a draft belongs to a target, and measure how well it predicts it.

    The target continues a built-in text greedily, and the draft is measured on that: drafts learn
    from what their target says, not from what others write.

    TARGET and DRAFT are folders or Hugging Face repositories; without them, the demo pair. The
    findings go to stdout. The exit code is 1 when the draft predicts too little.
    """
    if options["model"] is not None and options["draft"] is None:
        raise click.UsageError("a TARGET needs its DRAFT beside it.")
    console = Console(options["quiet"])

    from specdec.commands import session
    from specdec.draft.doctor import CHUNK, TEXT, examine
    from specdec.generation import Request, check_prompt, generate

    tokenizer, config = session.door(options)
    tokens = tokenizer.encode(TEXT)
    check_prompt(tokens, config)
    context = len(tokens) + options["positions"]
    # Logits of a whole chunk are looked at, as of a tree of that many rows.
    loaded = session.load(options, len(tokens), context, CHUNK, console, tokenizer)
    engine = loaded.engine
    assert engine.draft is not None
    request = Request(tuple(tokens), budget=1, max_tokens=options["positions"])
    console.say("the target continues the built-in text")
    own = generate(engine, tokenizer, request)
    if own.finish == "interrupted":
        raise KeyboardInterrupt
    found = examine(
        engine.target,
        engine.draft,
        [*tokens, *own.tokens],
        len(own.tokens),
        thorough=options["thorough"],
        on_progress=console.say,
    )
    for line in found.lines():
        emit(line)
    if not found.fits:
        raise SystemExit(1)
