"""What the commands ask alike: which model, how much memory, how wide a tree."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

MAX_BUDGET = 256
MAX_THREADS = 64
KERNELS = ("metal", "cuda", "cpu", "reference")  # kernels.array.BACKENDS, without importing MLX
IO = ("buffered", "direct")
POLICIES = ("lru", "s3-fifo")  # target.policy.POLICIES, without importing NumPy
PREFETCH = ("auto", "off", "draft", "layer")  # target.streaming.PREFETCH
TREES = ("best-first", "chain", "spine")

Command = TypeVar("Command", bound=Callable[..., Any])


def finite(ctx: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Callback of an option: NaN and infinities are no numbers to compute with."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


class CountOrAuto(click.ParamType):
    """A whole number from a least one on, or "auto": None, for the memory plan to decide."""

    name = "COUNT"

    def __init__(self, least: int) -> None:
        self.number = click.IntRange(min=least)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        return None if value == "auto" else self.number.convert(value, param, ctx)


class FirstLast(click.ParamType):
    """Two counts, "6,3"."""

    name = "PAIR"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if len(parts) != 2:
            self.fail(f"{value!r} is not two counts, as in 6,3.", param, ctx)
        first, last = (click.IntRange(min=0).convert(part.strip(), param, ctx) for part in parts)
        return first, last


def memory_options(command: Command) -> Command:
    """--pin-layers, --cache-slots, --memory-gb, --prefill-chunk; how experts are read and kept:
    --io, --queue-depth, --policy, --protect, --prefetch, --prefetch-mb; --threads."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(1, MAX_THREADS),
            help="Threads that compute the cpu kernels; no token depends on it.  [default: the "
            "cores this process may use, 8 at most]",
        ),
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
            callback=finite,
            metavar="GB",
            help="Cap of the memory plan; a plan that does not fit is refused.",
        ),
        click.option(
            "--cache-slots",
            type=CountOrAuto(1),
            metavar="M|auto",
            help="Experts that the other layers keep in memory together.  [default: auto, what "
            "fits under --memory-gb]",
        ),
        click.option(
            "--pin-layers",
            type=CountOrAuto(0),
            metavar="N|auto",
            help="Layers that keep all their experts in memory.  [default: auto, what fits under "
            "--memory-gb]",
        ),
        click.option(
            "--protect",
            type=FirstLast(),
            default="6,3",
            metavar="F,L",
            show_default=True,
            help="The first F and the last L layers can lose fewer of their slots to others.",
        ),
        click.option(
            "--prefetch-mb",
            type=click.FloatRange(min=0, max=1e6, min_open=True),
            callback=finite,
            metavar="MB",
            help="Most that is read ahead per forward pass.  [default: as much as passes miss]",
        ),
        click.option(
            "--prefetch",
            type=click.Choice(PREFETCH),
            default=PREFETCH[0],
            show_default=True,
            help="Read experts ahead by token, by the next layer's router, or as it pays.",
        ),
        click.option(
            "--policy",
            type=click.Choice(POLICIES),
            default=POLICIES[0],
            show_default=True,
            help="Which expert leaves its slot first.",
        ),
        click.option(
            "--queue-depth",
            type=click.IntRange(1, 64),
            default=8,
            show_default=True,
            help="Expert reads under way at most.",
        ),
        click.option(
            "--io",
            type=click.Choice(IO),
            default=IO[0],
            show_default=True,
            help="Read experts through the system's page cache, or directly past it.",
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
            help="Fill the slots with the experts that this hot set or routing log uses most; a "
            "log also begins the routing table of --prefetch.",
        ),
        click.option(
            "--cache-tolerance",
            type=click.FloatRange(min=0, max=1e6),
            callback=finite,
            default=0.0,
            show_default=True,
            metavar="F",
            help="Above 0, NOT EXACT: take experts in memory for absent ones whose logits are "
            "within this share of the range.",
        ),
    ):
        command = option(command)
    return command


def timing_option(command: Command) -> Command:
    """--timing."""
    return click.option(
        "--timing",
        is_flag=True,
        help="Print where each layer spends its time; measuring it slows the run down.",
    )(command)


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


class Several(click.ParamType):
    """A comma-separated list of different values, each of one kind; `noun` names the kind."""

    name = "LIST"

    def __init__(self, noun: str, one: click.ParamType) -> None:
        self.noun, self.one = noun, one

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        values = tuple(self.one.convert(part.strip(), param, ctx) for part in value.split(","))
        if len(set(values)) != len(values):
            self.fail(f"{value} names a {self.noun} twice.", param, ctx)
        return values
