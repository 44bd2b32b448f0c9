"""--budget and --max-budget: a number of tree nodes, or "auto"."""

from typing import Any, Literal

import click
from click.core import ParameterSource

from specdec.commands.console import Console
from specdec.commands.options import MAX_BUDGET, Command

AUTO_NODES = 16  # specdec.auto_budget.AUTO_NODES, without importing NumPy
Budget = int | Literal["auto"]


class NodesOrAuto(click.ParamType):
    """A number of tree nodes in 1..MAX_BUDGET, or "auto"."""

    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Budget:
        if value == "auto":
            return "auto"
        try:
            return click.IntRange(1, MAX_BUDGET).convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f'{error.message.rstrip(".")}; or "auto".', param, ctx)


def max_budget_option(command: Command) -> Command:
    """--max-budget."""
    return click.option(
        "--max-budget",
        type=click.IntRange(2, MAX_BUDGET),
        default=AUTO_NODES,
        show_default=True,
        metavar="N",
        help="The largest tree of budget auto; memory is planned for it.",
    )(command)


def planned(budgets: tuple[Budget, ...], max_budget: int, console: Console) -> int:
    """The largest tree that memory has to be planned for. A --max-budget in vain is said so."""
    source = click.get_current_context().get_parameter_source("max_budget")
    if source is ParameterSource.COMMANDLINE and "auto" not in budgets:
        console.note("note: --max-budget without effect: it limits --budget auto alone")
    return max(max_budget if budget == "auto" else budget for budget in budgets)
