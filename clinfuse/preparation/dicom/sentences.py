"""Pieces of the one sentence that a refused file ends in."""

from collections.abc import Sequence


def some(things: Sequence[object], most: int = 3) -> str:
    """The first few of several things, and how many more there are."""
    text = ", ".join(str(thing) for thing in things[:most])
    return text if len(things) <= most else f"{text} and {len(things) - most} more"


def one_line(error: Exception) -> str:
    """What a library complained of, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
