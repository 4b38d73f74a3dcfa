"""`python -m ganscale` is the `ganscale` command."""

from ganscale.cli import main

main()
