"""The `specdec` command: its subcommands, and how errors leave it.

Exit codes: 0 done; 1 runs that must agree do not, or the doctor found a draft that predicts too
little; 2 bad input, said in one line without a traceback; 130 interrupted; 141 nobody reads the
output any more. Anything else is a bug and shows its traceback.
"""

import sys
from typing import Any

import click

from specdec import __version__
from specdec.commands.bench import bench
from specdec.commands.console import tell
from specdec.commands.doctor import doctor
from specdec.commands.generate import generate
from specdec.commands.inspect import inspect
from specdec.commands.repack import repack
from specdec.commands.report import report
from specdec.commands.simulate import simulate
from specdec.entry import INTERRUPTED
from specdec.errors import OutputClosedError, SpecdecError


class _Commands(click.Group):
    """Turns expected errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if sys.stdout is None:
                raise SpecdecError("standard output is closed, and the results go there")
            return super().invoke(ctx)
        except OutputClosedError as error:
            return ctx.exit(error.exit_code)
        except SpecdecError as error:
            tell(f"error: {error}")
            return ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            tell("interrupted")
            return ctx.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Run Mixture-of-Experts models that are larger than memory, with speculative decoding.

    Without a model, commands use the small demo pair that comes with this package.
    """


for _command in (generate, bench, inspect, doctor, repack, simulate, report):
    main.add_command(_command)
