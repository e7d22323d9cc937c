"""`python -m deltaproduct` is the `deltaproduct` program."""

from deltaproduct.cli.main import main

main()
