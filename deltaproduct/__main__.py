"""`python -m deltaproduct` is the `deltaproduct` program."""

import sys

try:
    from deltaproduct.cli.main import main
except KeyboardInterrupt:  # before there is anything that could answer better
    print("deltaproduct: interrupted.", file=sys.stderr)
    raise SystemExit(130) from None

main()
