"""Names as messages show them."""

SHOWN = 80  # characters


def shortened(name: str) -> str:
    """A name in quotes, with what a terminal would obey escaped; of a long one its beginning and its length."""
    if len(name) <= SHOWN:
        return repr(name)
    return f"{name[: SHOWN - 20]!r}… ({len(name):,} characters)"
