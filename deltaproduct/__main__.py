"""`python -m deltaproduct` is the `deltaproduct` program."""

try:
    from deltaproduct.cli.main import main
except KeyboardInterrupt:  # before there is anything that could answer better
    print("deltaproduct: interrupted.", file=__import__("sys").stderr)
    raise SystemExit(130) from None

main()
