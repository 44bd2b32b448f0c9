"""`python -m specdec` is `specdec`."""

from specdec.entry import main

main()
