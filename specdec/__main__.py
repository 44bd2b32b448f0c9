"""`python -m specdec` is `specdec`."""

from specdec.cli import main

main(prog_name="specdec")
