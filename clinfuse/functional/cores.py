"""Independent parts of one task side by side, each on a core of its own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Made = TypeVar("Made")


def on_every_core(function: Callable[[Part], Made], parts: Iterable[Part]) -> list[Made]:
    """What the function makes of each part, in the order of the parts; without gradients.

    As many at a time as torch has threads, each with a torch of one thread: a part that fits in a
    core's cache stays there from one operation to the next, where torch's own threads would share
    every operation of the whole and wait for memory. Where torch has one thread, as in a data
    loader's worker, or there is one part, all is done here.
    """
    waiting = list(parts)
    threads, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def made(part: Part) -> Made:
        # Which mode is on is known to its thread alone, and inference's tensors need theirs.
        with torch.inference_mode(is_inference), torch.no_grad():
            return function(part)

    if threads == 1 or len(waiting) < 2:
        return [made(part) for part in waiting]
    try:
        with ThreadPoolExecutor(min(threads, len(waiting)), initializer=_take_one_core) as pool:
            return list(pool.map(made, waiting))
    finally:
        torch.set_num_threads(threads)  # some of torch's libraries have one number for all threads


def _take_one_core() -> None:
    torch.set_num_threads(1)
