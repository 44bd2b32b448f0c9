"""How the commands ask for a sampler: the options, and what they say together."""

import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import click

from specdec.commands.console import Console
from specdec.commands.options import Command, Several, finite
from specdec.sampling import ACCEPTS, MAX_SEED, Sampling

DRAWN_SEEDS = 2**32
"""Seeds that are drawn lie below: short enough to copy."""


class Temperature(click.FloatRange):
    """A finite number, 0 or above."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return float(number)


def sampling_options(
    default_seed: int | None, several: bool = False
) -> Callable[[Command], Command]:
    """--temp, --top-p, --top-k, --min-p, --repetition-penalty, --seed, --accept.

    default_seed: None to draw one for every run (`sampling`). several: --temps, a list, which
    --temp names too.
    """
    seed = "drawn, and printed" if default_seed is None else str(default_seed)

    def add(command: Command) -> Command:
        for option in (
            click.option(
                "--accept",
                type=click.Choice(ACCEPTS),
                default=ACCEPTS[0],
                show_default=True,
                help="match: the target draws, drafted tokens count where they match; the tokens "
                "are those of --budget 1. swor: drafted tokens are drawn too, without "
                "replacement, and accepted by the residual rule: more of them, from the same "
                "distribution, but NOT the tokens of --budget 1.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(0, MAX_SEED),
                default=default_seed,
                help=f"Of the random numbers, one per position.  [default: {seed}]",
            ),
            click.option(
                "--repetition-penalty",
                type=click.FloatRange(min=0, min_open=True),
                callback=finite,
                default=1.0,
                show_default=True,
                metavar="R",
                help="Divide the logits of tokens in the prompt or the text by R; 1: off.",
            ),
            click.option(
                "--min-p",
                type=click.FloatRange(0, 1),
                callback=finite,
                default=0.0,
                show_default=True,
                metavar="P",
                help="Keep tokens at least P times as probable as the likeliest; 0: off.",
            ),
            click.option(
                "--top-k",
                type=click.IntRange(min=0),
                default=0,
                show_default=True,
                metavar="K",
                help="Keep the K likeliest tokens; 0: off.",
            ),
            click.option(
                "--top-p",
                type=click.FloatRange(0, 1, min_open=True),
                callback=finite,
                default=1.0,
                show_default=True,
                metavar="P",
                help="Keep the likeliest tokens that together hold P of the probability; 1: off.",
            ),
            click.option(
                "--temps",
                "--temp",
                "temps",
                type=Several("temperature", Temperature()),
                default="0",
                show_default=True,
                help="Sampling temperatures to run, applied after the filters; 0: greedy.",
            )
            if several
            else click.option(
                "--temp",
                type=Temperature(),
                default=0.0,
                show_default=True,
                metavar="T",
                help="Sampling temperature, applied after the filters; 0: greedy.",
            ),
        ):
            command = option(command)
        return command

    return add


def sampling(options: Mapping[str, Any], console: Console, largest_budget: int) -> Sampling:
    """What the options say, a seed drawn where none was given. What has no effect is said so.

    UsageError for --accept swor at temperature 0.
    """
    cold = options["temp"] == 0.0
    if cold and options["accept"] == "swor":
        raise click.UsageError(
            "--accept swor needs --temp above 0: at temperature 0 nothing is drawn."
        )
    filters = [
        name
        for name, value, off in (
            ("--top-p", options["top_p"], 1.0),
            ("--top-k", options["top_k"], 0),
            ("--min-p", options["min_p"], 0.0),
        )
        if value != off
    ]
    if cold and filters:
        console.note(
            f"note: {', '.join(filters)} without effect: at --temp 0 the likeliest token is taken, "
            "which they keep"
        )
    if options["accept"] == "swor" and largest_budget == 1:
        console.note("note: --accept swor without effect: with --budget 1 nothing is drafted")
    seed = options["seed"]
    if seed is None:
        seed = 0 if cold else secrets.randbelow(DRAWN_SEEDS)
    return Sampling(
        temperature=options["temp"],
        top_p=options["top_p"],
        top_k=options["top_k"],
        min_p=options["min_p"],
        repetition_penalty=options["repetition_penalty"],
        seed=seed,
        accept=options["accept"],
    )
