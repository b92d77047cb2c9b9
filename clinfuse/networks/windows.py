"""Networks on volumes of any size: windows whose answers are blended within each evaluation."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from clinfuse.networks.mapped_memory import within_memory

log = logging.getLogger(__name__)

OVERLAP = 4
"""Of neighbouring windows, in rims: one of each, and as much between them to fade over."""


@dataclass(frozen=True)
class Windows:
    """How a grid is cut: windows that overlap, and fade into one another where they do.

    The ``silent`` rim towards a neighbour has no say, for there a network sees where its window
    ends; over the rest of the overlap one window's weight falls as the next one's rises.

    Attributes:
        shape: of a window, voxels of the grid that the network works on; an axis that is no longer
            is not cut.
        overlap: of neighbours, in voxels of that grid.
        silent: the rim's width, less than half of the overlap; as far as the network reaches, a
            window says what the whole would.
        stride: what windows begin at multiples of, as the network halves the grid: only there does
            a window see what the whole would.
    """

    shape: Sequence[int]
    overlap: int
    silent: int = 0
    stride: int = 1

    def __post_init__(self) -> None:
        if 2 * self.silent > self.overlap:
            raise ValueError(f"expected an overlap of 2 x {self.silent}, got {self.overlap}")
        if any(size % self.stride for size in self.shape):
            raise ValueError(f"expected multiples of {self.stride}, got {tuple(self.shape)}")

    def cut(self, grid: Sequence[int]) -> Iterator[tuple[slice, ...]]:
        """Where the windows lie; every voxel is in one, and the last ones end with the grid."""
        axes = zip(grid, self.shape, strict=True)
        starts = [_starts(n, size, self.overlap, self.stride) for n, size in axes]
        for corner in itertools.product(*starts):
            yield tuple(
                slice(start, min(start + size, n))
                for start, size, n in zip(corner, self.shape, grid, strict=True)
            )

    def weight(self, window: Sequence[slice], grid: Sequence[int]) -> Float[Tensor, "*window"]:
        """How much a window says of each of its voxels, before all weights are made to sum to 1."""
        weight = torch.ones([1] * len(grid))
        for axis, (part, n) in enumerate(zip(window, grid, strict=True)):
            ramp = _ramp(part.stop - part.start, part.start > 0, part.stop < n, self)
            weight = weight * ramp.reshape([-1 if i == axis else 1 for i in range(len(grid))])
        return weight


def windows_within(
    memory_gb: float | None,
    bytes_per_voxel: float,
    grid: Sequence[int],
    stride: int,
    batch: int = 1,
    silent: int = 8,
) -> Windows | None:
    """The windows with the least to evaluate of those that fit into so much memory.

    None if the whole fits. An axis is rather left whole than cut with most of it evaluated twice.

    Args:
        memory_gb: for one evaluation's features, in 10^9 bytes; None does not ask.
        bytes_per_voxel: that an evaluation takes for each voxel of the network's grid.
        grid: shape of the whole.
        stride: how often the network halves the grid, as a factor.
        batch: how many are evaluated together.
        silent: of the windows, which overlap by four times as much.

    Raises:
        ValueError: if not even the smallest windows fit.
    """
    if memory_gb is None:
        return None
    most = memory_gb * 1e9 / (bytes_per_voxel * batch)
    if math.prod(grid) <= most:
        return None
    shape = _cheapest_shape(tuple(grid), most, stride, silent)
    if shape is None:
        least = smallest_window(grid, stride, silent)
        raise ValueError(
            f"expected memory_gb of at least {math.prod(least) * bytes_per_voxel * batch / 1e9:.2g}"
            f" for windows of {max(least)} voxels of the network's grid, got {memory_gb:g}"
        )
    return Windows(shape, OVERLAP * silent, silent, stride)


@lru_cache
def _cheapest_shape(
    grid: tuple[int, ...], most: float, stride: int, silent: int
) -> tuple[int, ...] | None:
    """Of no more voxels than that, with the fewest to evaluate in all, then the fewest windows."""
    found: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    least = smallest_window(grid, stride, silent)
    for sides in itertools.product(
        *(_sides(n, low, OVERLAP * silent, stride) for n, low in zip(grid, least, strict=True))
    ):
        shape, windows = tuple(size for size, _ in sides), math.prod(count for _, count in sides)
        cost = (windows * math.prod(shape), windows, max(shape))
        if math.prod(shape) <= most and (found is None or cost < found[0]):
            found = cost, shape
    return None if found is None else found[1]


def _sides(n: int, least: int, overlap: int, stride: int) -> list[tuple[int, int]]:
    """The smallest windows of an axis for every number of them, and that number."""
    found: list[tuple[int, int]] = []
    for size in range(least, -(-n // stride) * stride + 1, stride):
        count = len(_starts(n, size, overlap, stride))
        if not found or count < found[-1][1]:
            found.append((size, count))
    return found


def smallest_window(grid: Sequence[int], stride: int, silent: int = 8) -> list[int]:
    """The shape below which ``windows_within`` does not go: six rims wide, or as the grid is."""
    least_side = -(-6 * silent // stride)
    return [min(least_side, -(-n // stride)) * stride for n in grid]


def blended(
    evaluate: Callable[[tuple[slice, ...]], Float[Tensor, "b c *window"]],
    grid: Sequence[int],
    windows: Windows | None,
) -> Float[Tensor, "b c *grid"]:
    """A network's answer over a grid, window by window; all at once without windows.

    Args:
        evaluate: the answer in a window.
        grid: shape of the whole.
        windows: None is one of the whole.
    """
    if windows is None:
        with within_memory():
            return evaluate(tuple(slice(0, n) for n in grid))
    total, weights = None, torch.zeros(*grid)
    for window in windows.cut(grid):
        weight = windows.weight(window, grid)
        weights[window] += weight
        with within_memory():
            answer = evaluate(window)
            answer = answer * weight.to(answer)
        if total is None:
            total = answer.new_zeros(*answer.shape[:2], *grid)
        part_of(total, window).add_(answer)
    assert total is not None
    return total.div_(weights.to(total))


def part_of(volume: Float[Tensor, "b c *grid"], window: Sequence[slice]) -> Tensor:
    """A window of a volume: a view."""
    place: tuple[Any, ...] = (..., *window)
    return volume[place]


class Windowed(nn.Module):
    """A network that evaluates what is too large for its memory in windows.

    Where memory runs out all the same, it halves the window and says so: ``memory_gb`` is then half
    of what that evaluation took, for those that follow too.

    Attributes:
        memory_gb: for one evaluation's features, in 10^9 bytes; None, as built, for any amount.
        bytes_per_voxel: that an evaluation takes for each voxel of the network's own grid.
        is_local: whether a window says what the whole would, as far as the convolutions reach.
        used: the windows of the last evaluation that needed some.
        halvings: how often memory has run out.
    """

    memory_gb: float | None = None
    bytes_per_voxel: float = 0.0
    is_local: bool = True
    used: Windows | None = None
    halvings: int = 0

    def windows(
        self, grid: Sequence[int], stride: int, batch: int, silent: int = 8
    ) -> Windows | None:
        """The windows for a grid, None where the whole fits."""
        found = windows_within(self.memory_gb, self.bytes_per_voxel, grid, stride, batch, silent)
        self.used = found or self.used
        return found

    def answer(
        self,
        evaluate: Callable[[tuple[slice, ...]], Float[Tensor, "b c *window"]],
        grid: Sequence[int],
        stride: int,
        batch: int,
        silent: int = 8,
    ) -> Float[Tensor, "b c *grid"]:
        """``blended`` in windows that fit, halved as often as memory runs out.

        Not while gradients are kept, for what all windows keep is as much as the whole.

        Args:
            evaluate: the answer in a window.
            grid: shape of the whole.
            stride: how often the network halves the grid, as a factor.
            batch: how many are evaluated together.
            silent: of the windows.

        Raises:
            MemoryError: the smallest window does not fit.
        """
        while True:
            windows = self.windows(grid, stride, batch, silent)
            try:
                return blended(evaluate, grid, windows)
            except (RuntimeError, MemoryError) as error:
                if torch.is_grad_enabled() or not is_out_of_memory(error):
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tried = list(grid) if windows is None else windows.shape
            self._halve(tried, smallest_window(grid, stride, silent), batch, reason)

    def _halve(self, tried: Sequence[int], least: Sequence[int], batch: int, reason: str) -> None:
        """Take half of the memory that windows of the shape tried would have needed."""
        each_gb = self.bytes_per_voxel * batch / 1e9
        voxels, fewest = math.prod(tried), math.prod(least)
        name, shape = type(self).__name__, " x ".join(map(str, tried))
        if voxels <= fewest:
            raise MemoryError(
                f"memory ran out in the smallest window of {name}, {shape} voxels of its grid for "
                f"{batch} volumes at once, which takes about {voxels * each_gb:.2g} GB ({reason}): "
                f"expected so much to be free, or fewer members (members=), a smaller network or "
                f"another device (trainer.accelerator=cpu)"
            )
        self.memory_gb = max(voxels / 2, fewest * (1 + 1e-9)) * each_gb
        self.halvings += 1
        log.warning(
            "memory ran out in %s at %s voxels of its grid: windows half as large, of %.2g GB",
            *(name, shape, self.memory_gb),
        )


_SAID_OF_MEMORY = (
    *("can't allocate memory", "std::bad_alloc", "not enough memory", "out of memory"),
    *("cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, a CPU's allocator's or a GPU's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in text for said in _SAID_OF_MEMORY)


def limit_memory(network: nn.Module, memory_gb: float | None) -> None:
    """Give every network in it that can be evaluated in windows so much memory at a time."""
    for module in network.modules():
        if isinstance(module, Windowed):
            module.memory_gb, module.used, module.halvings = memory_gb, None, 0


def windows_used(network: nn.Module) -> str:
    """What windows a network was evaluated in since its memory was limited, in words; "" for none.

    Says where memory had run out before, and where a window's statistics were its own.
    """
    used = [m for m in network.modules() if isinstance(m, Windowed) and m.used is not None]
    if not used:
        return ""
    shapes = {" x ".join(map(str, m.used.shape)) for m in used if m.used is not None}
    text = f"{', '.join(sorted(shapes))} voxels of the network's grid"
    if any(m.halvings for m in used):
        text += ", halved until they fitted the memory that was left"
    if all(m.is_local for m in used):
        return text
    return f"{text}, each normalised by itself: a run with network=local says the same as the whole"


class VoxelNorm(nn.Module):
    """Features normalised at each voxel by itself: layer norm over the channels.

    Ba et al. (2016), as Liu et al. (2022), ConvNeXt, have it in place of a norm over space. A group
    norm takes its mean and size from the whole volume, so that what a network says of a voxel hangs
    on how much air there is at the other end, and a window says something else. This doesn't.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Float[Tensor, "b c *dhw"]) -> Float[Tensor, "b c *dhw"]:
        last = x.movedim(1, -1)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(last, (x.shape[1],), weight, bias, self.eps).movedim(-1, 1)


def with_local_norms(network: nn.Module) -> nn.Module:
    """The network itself, every group norm in it made a ``VoxelNorm``, weights new."""
    for module in network.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, VoxelNorm(child.num_channels, child.eps))
    return network


def _starts(n: int, size: int, overlap: int, stride: int) -> list[int]:
    """Evenly spread, in multiples of the stride, so that neighbours overlap by at least so much."""
    if n <= size:
        return [0]
    if size - overlap < stride:
        raise ValueError(f"expected windows of at least {overlap + stride} voxels, got {size}")
    count = math.ceil((n - overlap) / (size - overlap))
    while True:
        last = (n - size) / stride
        starts = [stride * math.floor(last * i / (count - 1)) for i in range(count)]
        starts[-1] = stride * math.ceil(last)
        if max(b - a for a, b in itertools.pairwise(starts)) <= size - overlap:
            return starts
        count += 1


def _ramp(size: int, has_before: bool, has_after: bool, windows: Windows) -> Tensor:
    """1 in the middle; towards a neighbour it falls to 0 over the overlap, less the rims."""
    silent, width = windows.silent, max(windows.overlap - 2 * windows.silent, 1)
    at = torch.arange(size) + 0.5
    weight = torch.ones(size)
    for is_cut, depth in ((has_before, at), (has_after, size - at)):
        if is_cut:
            share = ((depth - silent) / width).clamp(0, 1)
            weight = weight * torch.sin(share * (math.pi / 2)).square()
    return weight
