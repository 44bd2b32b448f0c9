"""`specdec generate`: one prompt, its text streamed, then what it took."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.commands.budgets import Budget, NodesOrAuto, max_budget_option, planned
from specdec.commands.console import Console
from specdec.commands.options import (
    model_options,
    routing_options,
    timing_option,
    tree_option,
)
from specdec.commands.runs import Runs
from specdec.commands.sampling import sampling, sampling_options
from specdec.commands.watch import Watch, watch_options
from specdec.commands.watch import check as check_watch
from specdec.errors import DisagreementError, PromptError, SpecdecError

if TYPE_CHECKING:
    from specdec.generation import Request, Result
    from specdec.metrics import Memory
    from specdec.tokenizer import Tokenizer

DEFAULT_BUDGET = 6
WARM_UP_PROMPT, WARM_UP_TOKENS = 32, 8

DEMO_PROMPT = '''import os
from pathlib import Path


def read_lines(path, encoding="utf-8"):
    """Return the lines of a text file, without their line ends."""
'''
"""What the demo pair continues when it is given nothing: it was trained on Python."""


@click.command()
@model_options
@click.option("--prompt", "-p", metavar="TEXT", help='The prompt; "-" reads standard input.')
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a UTF-8 file.")
@click.option("--system", metavar="TEXT", help="System message for the chat template.")
@click.option("--raw", is_flag=True, help="Do not use the chat template.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Token limit."
)
@click.option(
    "--budget",
    type=NodesOrAuto(),
    help="Tree nodes per round; 1: plain decoding; auto: as many as pay, round by round, or none.  "
    f"[default: {DEFAULT_BUDGET}, without draft 1]",
)
@max_budget_option
@tree_option
@sampling_options(default_seed=None)
@timing_option
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Do not end at the model's end tokens.")
@click.option("--compare", is_flag=True, help="Also run without speculation, and compare.")
@click.option("--json", "json_path", metavar="FILE", help="Write all figures to FILE.")
@watch_options
@routing_options
@click.option("--quiet", "-q", is_flag=True, help="Print the text, and on stderr only problems.")
def generate(**options: Any) -> None:
    """Generate text from one prompt: the text on stdout, everything else on stderr."""
    _check(options)
    console = Console(options["quiet"])
    prompt = _prompt(options)
    budget = _budget(options, console)
    largest = planned((budget,), options["max_budget"], console)
    chosen = sampling(options, console, largest)

    from specdec import record
    from specdec.commands import session
    from specdec.generation import Request, check_prompt
    from specdec.routing_writer import RoutingWriter
    from specdec.vocabulary import vocabulary

    with (
        record.JsonFile(options["json_path"]) as file,
        RoutingWriter(options["collect_routing"]) as routing,
    ):
        tokenizer, config = session.door(options)
        eos_ids = () if options["ignore_eos"] else tokenizer.eos_ids
        text, tokens = _encode(tokenizer, prompt, options)
        check_prompt(tokens, config)
        context = len(tokens) + options["max_tokens"]
        loaded = session.load(options, len(tokens), context, largest, console, tokenizer)
        routing.begin(loaded, options["cache_tolerance"])
        warmed = session.warm(options, loaded, console)
        uses = session.count_uses(options, loaded)
        request = Request(
            prompt_tokens=tokens,
            budget=budget,
            tree=options["tree"],
            max_tokens=options["max_tokens"],
            stop=options["stop"],
            eos_ids=eos_ids,
            sampling=chosen,
            max_budget=largest if budget == "auto" else None,
        )
        runs, watch = Runs(loaded, console), Watch(options, tokenizer, console)
        ended: BaseException | None = None
        try:
            if options["compare"]:
                _compare(runs, request, console, watch)
            else:
                runs.make("autoregressive" if budget == 1 else "speculative", request, watch)
        except (KeyboardInterrupt, SpecdecError) as error:
            ended = error  # what was done until then is told first
        memory = session.memory(loaded.plan)
        session.save_uses(options, uses)
        told = _tell(runs.results, memory, console)
        if not isinstance(ended, SpecdecError):
            settings = {**options, "budget": budget, "seed": chosen.seed}
            head = record.head("generate", settings, loaded.backend, loaded.plan, memory, warmed)
            told["vocabulary"] = vocabulary(tokenizer, runs.results.values())
            file.write(head | {"partial": ended is not None, "prompt": text} | told)
    if ended is not None:
        raise ended
    # Otherwise they may differ, and the report says so.
    if chosen.same_for_every_budget and not options["cache_tolerance"]:
        _check_agreement(runs.results)


def _check(options: dict[str, Any]) -> None:
    """Refuse options that contradict each other, before any work."""
    if options["prompt"] is not None and options["prompt_file"] is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other.")
    if options["raw"] and options["system"] is not None:
        raise click.UsageError("--system needs the chat template that --raw skips.")
    check_watch(options)
    if "" in options["stop"]:
        raise click.UsageError("--stop must not be empty: every text would end at once.")
    if options["compare"] and options["budget"] == 1:
        raise click.UsageError("--compare with --budget 1 would compare plain decoding to itself.")
    for stop in options["stop"]:
        try:
            stop.encode()
        except UnicodeError as error:
            raise SpecdecError(f"--stop: {error}") from error


def _prompt(options: dict[str, Any]) -> str:
    """The prompt as the user gave it."""
    try:
        if options["prompt_file"] is not None:
            text = Path(options["prompt_file"]).read_bytes().decode()  # line ends as they are
        elif options["prompt"] == "-":
            if sys.stdin is None:
                raise PromptError("standard input is closed, and --prompt - reads it")
            text = sys.stdin.buffer.read().decode()
        elif options["prompt"] is not None:
            text = options["prompt"]
            text.encode()  # fails where the argument was not text in the locale's encoding
        elif options["model"] is None:
            text = DEMO_PROMPT
        else:
            raise PromptError("no prompt: give --prompt TEXT, --prompt - or --prompt-file FILE")
    except (OSError, UnicodeError) as error:
        from_argument = options["prompt"] not in (None, "-")
        source = "--prompt" if from_argument else options["prompt_file"] or "standard input"
        raise PromptError(f"{source}: {error}") from error
    if not text:
        raise PromptError("the prompt is empty")
    return text


def _budget(options: dict[str, Any], console: Console) -> Budget:
    """The budget as asked for; without a draft only 1 is possible."""
    budget: Budget | None = options["budget"]
    has_draft = options["draft"] is not None or options["model"] is None
    if has_draft:
        return budget or DEFAULT_BUDGET
    if options["compare"]:
        raise click.UsageError("--compare needs a draft: give --draft.")
    if budget in (None, "auto"):
        console.note("no --draft: plain decoding, budget 1")
        return 1
    if budget != 1:
        raise click.UsageError(f"--budget {budget} needs a draft: give --draft, or --budget 1.")
    return budget


def _encode(
    tokenizer: "Tokenizer", prompt: str, options: dict[str, Any]
) -> tuple[str, tuple[int, ...]]:
    """The text that the model sees, and its tokens."""
    if options["raw"] or not tokenizer.has_template:
        if options["system"] is not None:
            raise PromptError("--system: this model has no chat template")
        return prompt, tuple(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    if options["system"] is not None:
        messages.insert(0, {"role": "system", "content": options["system"]})
    text = tokenizer.apply_template(messages)
    return text, tuple(tokenizer.encode(text, add_special=False))


def _compare(runs: Runs, request: "Request", console: Console, watch: Watch) -> None:
    """Warm up both ways, then run plain and speculative; only the latter is shown."""
    plain = replace(request, budget=1)
    console.say("order: a short warm-up, autoregressive, speculative")
    for one in (plain, request):
        short = replace(
            one,
            prompt_tokens=one.prompt_tokens[:WARM_UP_PROMPT],
            max_tokens=min(WARM_UP_TOKENS, one.max_tokens),  # the plan holds for no more
        )
        if runs.pass_by("warm-up", short).finish == "interrupted":
            raise KeyboardInterrupt
    runs.make("autoregressive", plain, None)
    runs.make("speculative", request, watch)


def _tell(results: "dict[str, Result]", memory: "Memory", console: Console) -> dict[str, Any]:
    """Print the figures; return what the JSON says of the runs."""
    from specdec import record
    from specdec.metrics import compare, measure
    from specdec.report import side_by_side, summary

    console.say("\n")
    for result in results.values():
        if result.plain_reason is not None:
            plain = sum(one.budget == 1 for one in result.rounds)
            console.note(
                f"note: --budget auto decoded {plain} of {len(result.rounds)} rounds without "
                f"drafting: {result.plain_reason}"
            )
    document: dict[str, Any] = {
        "runs": {name: record.run(result, measure(result)) for name, result in results.items()},
        "comparison": None,
    }
    if _is_comparison(results):
        done = compare(results["autoregressive"], results["speculative"])
        document["comparison"] = record.comparison(done)
        console.say(side_by_side(done, memory))
    else:
        for name, result in results.items():
            console.say(f"{name}\n{summary(measure(result), memory)}")
    return document


def _check_agreement(results: "dict[str, Result]") -> None:
    """DisagreementError where two whole runs emitted different tokens."""
    from specdec.metrics import first_difference

    if _is_comparison(results):
        position = first_difference(*(result.tokens for result in results.values()))
        if position is not None:
            raise DisagreementError(
                f"speculative and autoregressive tokens differ from position {position} on"
            )


def _is_comparison(results: "dict[str, Result]") -> bool:
    """Whether there are two whole runs: one that was cut off compares to nothing."""
    return len(results) == 2 and all(
        one.finish not in ("interrupted", "error") for one in results.values()
    )
