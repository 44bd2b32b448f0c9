"""Where the `specdec` command begins: before anything that takes time to import.

Ctrl-C ends the command with exit code 130 and without a traceback from the first import to the end
of the process.
"""

import os
import signal
import sys

from specdec.mlx_environment import tell_mlx

INTERRUPTED = 130


def main() -> None:
    """Run the command line of `specdec.cli` on this process's arguments."""
    if sys.stderr is None:
        # Closed by the caller. Taken at once, lest a model's file get its number, and what
        # libraries print.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    if sys.stdout is not None:
        # What the terminal's encoding does not have is written as an escape.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    tell_mlx()
    try:
        from specdec.cli import main as commands

        try:
            commands(prog_name="specdec")
        finally:
            # Everything is told: the exit code stands, whoever presses Ctrl-C again.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        # Not an exit through the interpreter, which would run what the interrupt cut off.
        os._exit(INTERRUPTED)
