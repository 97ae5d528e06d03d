"""`python -m ringattn.cli`."""

from ringattn.cli import main

main()
