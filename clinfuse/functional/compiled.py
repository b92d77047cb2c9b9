"""Loops over voxels as numba compiles them here: fast, without losing a NaN."""

from collections.abc import Callable
from typing import Any

from numba import njit

PLACE = (1 << 48) - 1
"""All bits of a place in memory. Numba counts negative places from the end; where it can see that
one is not negative, it leaves the loop to vector instructions."""

# Nothing here that would lose a NaN: it has to come out where it went in.
_AS_FAST = {"arcp", "contract", "nsz"}

part_of_loop = njit(fastmath=_AS_FAST, error_model="numpy")
"""A function that a compiled loop calls."""

inlined = njit(fastmath=_AS_FAST, error_model="numpy", inline="always")
"""The same, made a part of the loop."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call and kept on disk where there is room to write.

    That is beside the source, else in the user's cache; where both are read-only, every process
    compiles its own.
    """
    try:
        return njit(function, fastmath=_AS_FAST, error_model="numpy", nogil=True, cache=True)
    except RuntimeError:
        return njit(function, fastmath=_AS_FAST, error_model="numpy", nogil=True)
