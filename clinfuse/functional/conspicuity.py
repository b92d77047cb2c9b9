"""Does a finding stay visible: its contrast-to-noise in the fused image over its better source's.

A metric, computed on CPU and without gradients. "Noise" is whatever a finding has to stand out
from: the standard deviation of the tissue around it, anatomy included (Revesz & Kundel, 1974).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import binary_dilation, distance_transform_edt, find_objects, label
from torch import Tensor

from clinfuse.functional.regional import bounding_box
from clinfuse.functional.spacing import SpacingMm, spacing_of_each

NOISE_FLOOR = 0.1
"""Least noise, in model space: 5 % of its width, which a display hardly shows. A noise-free CT's
brain is flatter than that, and would make any shade of grey a contrast to beat."""

VISIBLE = 0.5
"""A finding under this contrast-to-noise in both sources is shown by neither."""

PLAIN = 3.0
"""Contrast-to-noise of a finding outside what its surround has, from which on it is plainly
visible (Rose, 1973, asks 3 to 5): more in a source is nothing that a fused image could lose."""

RING_MM = 6.0
"""How far from a finding its surround reaches."""

SMALLEST_VOXELS, SMALLEST_SURROUND_VOXELS = 4, 20
"""Fewer voxels are partial volume and have no mean, or no standard deviation, to speak of."""


def conspicuity(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
    findings: Bool[Tensor, "b 1 *dhw"],
    brain: Bool[Tensor, "b 1 *dhw"],
    spacing_mm: SpacingMm,
    others: Bool[Tensor, "b 1 *dhw"] | None = None,
) -> list[Float[Tensor, " _"]]:
    """For each case, the share in [0, 1] of each finding's visibility that the fused image keeps.

    Contrast-to-noise in F over that in the better source (method, section 3), for the connected
    parts (diagonals connect) of ``findings``, in the order of their first voxels. Unlike the plain
    ratio,

    - the noise of F counts at least as large as the better source's: smoothing the surround away
      does not make up for lost contrast;
    - the source counts up to ``PLAIN`` and the ratio up to 1, so that one finding painted on thick
      does not outweigh another that vanished;
    - contrast has no sign: a finding dark in F and bright on CT is seen.

    It cannot tell why a place stands out: anatomy that happens to have a CT-only finding's shape,
    say bright fluid around plexus calcium, counts as the finding.

    NaN is a finding of under 4 voxels, with under 20 voxels of surround (one enclosed in a lesion
    has none), or that no source shows (``VISIBLE``): it can't vanish.

    Args:
        fused: in model space.
        mri: clean, in model space.
        ct: clean and registered, in model space.
        findings: true masks of what should be seen.
        brain: the surround lies in it, a voxel clear of its border.
        spacing_mm: voxel size.
        others: findings of another kind, that the surround keeps clear of; None for none.
    """
    others = torch.zeros_like(findings) if others is None else others
    rows = spacing_of_each(spacing_mm, len(fused))
    shares = []
    for case, row in enumerate(rows):
        near = _within(bounding_box(findings[case, 0]), _reach(row))
        volumes = torch.stack([volume[case, 0][near] for volume in (fused, mri, ct)])
        masks = torch.stack([mask[case, 0][near] for mask in (findings, brain, others)])
        around = _each_finding(volumes.detach().cpu().double(), masks.cpu().numpy(), row)
        kept = [_kept_share(*finding) for finding in around]
        shares.append(torch.tensor(kept, dtype=torch.float32))
    return shares


def contrast_to_noise(
    volume: Float[Tensor, "*dhw"],
    finding: Bool[Tensor, "*dhw"],
    surround: Bool[Tensor, "*dhw"],
    least_noise: float = NOISE_FLOOR,
) -> Float[Tensor, ""]:
    """|mean of the finding - mean of its surround| / standard deviation of the surround.

    Args:
        volume: in model space.
        finding: its voxels.
        surround: voxels that it has to stand out from.
        least_noise: what the standard deviation counts at least, in model space.
    """
    around = volume[surround]
    contrast = (volume[finding].mean() - around.mean()).abs()
    return contrast / around.std(correction=0).clamp(min=least_noise)


def surround_of(
    finding: Bool[np.ndarray, "*dhw"],
    brain: Bool[np.ndarray, "*dhw"],
    excluded: Bool[np.ndarray, "*dhw"],
    spacing_mm: Sequence[float | int],
) -> Bool[np.ndarray, "*dhw"]:
    """Brain within ``RING_MM`` of a finding.

    One voxel of partial volume, diagonal neighbours too, is left out around the finding, around
    all that is excluded, and along the brain's border.
    """
    distance_mm = distance_transform_edt(~finding, spacing_mm)
    spoilt = binary_dilation(finding | excluded | ~brain, _neighbours(finding.ndim))
    return (distance_mm <= RING_MM) & ~spoilt


def _kept_share(volumes: Tensor, finding: Tensor, surround: Tensor) -> float:
    """``volumes`` are F and the sources."""
    if finding.sum() < SMALLEST_VOXELS or surround.sum() < SMALLEST_SURROUND_VOXELS:
        return float("nan")
    fused, *sources = volumes
    seen = [float(contrast_to_noise(source, finding, surround)) for source in sources]
    if max(seen) < VISIBLE:
        return float("nan")
    better = sources[int(np.argmax(seen))]
    noise = max(NOISE_FLOOR, float(better[surround].std(correction=0)))
    kept = float(contrast_to_noise(fused, finding, surround, noise))
    return min(1.0, kept / min(max(seen), PLAIN))


def _each_finding(
    volumes: Tensor, masks: np.ndarray, spacing_mm: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The volumes around each connected part of the findings, the part and its surround."""
    findings, brain, others = masks
    parts, _ = label(findings, _neighbours(findings.ndim))
    for number, box in enumerate(find_objects(parts), 1):
        near = _within(box, _reach(spacing_mm))
        finding = parts[near] == number
        excluded = findings[near] | others[near]
        surround = surround_of(finding, brain[near], excluded, spacing_mm)
        yield volumes[:, *near], torch.from_numpy(finding), torch.from_numpy(surround)


def _reach(spacing_mm: Sequence[float]) -> list[int]:
    """How many voxels from a finding its surround, and what spoils that, can lie."""
    return [int(RING_MM / size) + 2 for size in spacing_mm]


def _within(box: Sequence[slice], reach: Sequence[int]) -> tuple[slice, ...]:
    """The box and as many voxels more on either side."""
    return tuple(
        slice(max(side.start - n, 0), side.stop + n) for side, n in zip(box, reach, strict=True)
    )


def _neighbours(dims: int) -> np.ndarray:
    return np.ones((3,) * dims, bool)
