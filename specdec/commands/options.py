"""What the commands ask alike: which model, how much memory, how wide a tree."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

MAX_BUDGET = 256
KERNELS = ("metal", "cuda", "cpu", "reference")  # kernels.array.BACKENDS, without importing MLX
TREES = ("best-first", "chain", "spine")

Command = TypeVar("Command", bound=Callable[..., Any])


def _finite(ctx: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


def memory_options(command: Command) -> Command:
    """--pin-layers, --cache-slots, --memory-gb, --prefill-chunk."""
    for option in (
        click.option(
            "--prefill-chunk",
            type=click.IntRange(min=1),
            default=256,
            show_default=True,
            help="Prompt tokens per forward pass.",
        ),
        click.option(
            "--memory-gb",
            type=click.FloatRange(min=0, max=1e6, min_open=True),
            callback=_finite,
            metavar="GB",
            help="Cap of the memory plan; a plan that does not fit is refused.",
        ),
        click.option(
            "--cache-slots",
            type=click.IntRange(min=1),
            metavar="M",
            help="Experts that the other layers keep in memory together.  [default: what fits]",
        ),
        click.option(
            "--pin-layers",
            type=click.IntRange(min=0),
            metavar="N",
            help="Layers that keep all their experts in memory.  [default: what fits]",
        ),
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """--model, --draft and the memory options."""
    command = memory_options(command)
    for option in (
        click.option(
            "--draft",
            metavar="PATH|REPO",
            help="DFlash draft: a folder or a Hugging Face repository.",
        ),
        click.option(
            "--model",
            "-m",
            metavar="PATH|REPO",
            help="Target: a folder or a Hugging Face repository.  [default: the demo pair]",
        ),
    ):
        command = option(command)
    return command


def routing_options(command: Command) -> Command:
    """--cache-tolerance, --warm, --save-warm, --collect-routing."""
    for option in (
        click.option(
            "--collect-routing",
            metavar="FILE",
            help="Write down which experts every row chose, for `specdec simulate` and repacking.",
        ),
        click.option(
            "--save-warm",
            metavar="FILE",
            help="Write down how often each expert was used, for --warm.",
        ),
        click.option(
            "--warm",
            metavar="FILE",
            help="Fill the slots with the experts that this hot set or routing log uses most.",
        ),
        click.option(
            "--cache-tolerance",
            type=click.FloatRange(min=0, max=1e6),
            callback=_finite,
            default=0.0,
            show_default=True,
            metavar="F",
            help="Above 0, NOT EXACT: take experts in memory for absent ones whose logits are "
            "within this share of the range.",
        ),
    ):
        command = option(command)
    return command


def tree_option(command: Command) -> Command:
    """--tree."""
    return click.option(
        "--tree",
        type=click.Choice(TREES),
        default=TREES[0],
        show_default=True,
        help="How drafted tokens are arranged.",
    )(command)


def kernels_option(command: Command) -> Command:
    """--kernels."""
    return click.option(
        "--kernels",
        type=click.Choice(KERNELS),
        help="Who computes; forces one where SPECDEC_KERNELS does not.  [default: what suits]",
    )(command)


class Budgets(click.ParamType):
    """A comma-separated list of different budgets, each in 1..MAX_BUDGET."""

    name = "LIST"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        one = click.IntRange(1, MAX_BUDGET)
        budgets = tuple(one.convert(part.strip(), param, ctx) for part in value.split(","))
        if len(set(budgets)) != len(budgets):
            self.fail(f"{value} names a budget twice.", param, ctx)
        return budgets
