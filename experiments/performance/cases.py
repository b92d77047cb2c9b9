"""What benchmarks fuse and train on: phantoms, at any size, and volumes of noise.

Not run by hand: the benchmarks beside it import it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from clinfuse.data.paired_volumes import study_item
from clinfuse.data.phantoms import make_phantom, write_study
from clinfuse.data.studies import load_study
from clinfuse.types import ROI_NAMES, FusionBatch


def phantom(
    case: int, seed: int, shape: Sequence[int] = (32, 96, 96), contrast: str = "t2"
) -> FusionBatch:
    """A phantom as a study on disk would be read, over the same field of view at any shape."""
    spacing_mm = [128 / shape[0], 192 / shape[1], 192 / shape[2]]
    made = make_phantom(case, seed, shape, spacing_mm, contrast)
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder, made.case_id)
        study.mkdir()
        write_study(study, made, seed)
        return study_item(load_study(study), torch.eye(4, dtype=torch.float64))


def phantoms(cases: int, seed: int, shape: Sequence[int]) -> list[FusionBatch]:
    """So many, of all three contrasts in turn."""
    contrasts = ("t1", "t2", "adc")
    return [phantom(case, seed, shape, contrasts[case % 3]) for case in range(cases)]


def phantom_with_lesion(shape: Sequence[int]) -> FusionBatch:
    """A phantom whose lesion has some volume, brought to a shape.

    It is drawn at 32 x 96 x 96 and interpolated, for a phantom drawn at a scanner's size takes
    longer than to fuse it; what costs depend on (the regions' share of the volume, the head in
    the middle, air around it) stays as it is.
    """
    drawn = next(p for p in (phantom(case, 5) for case in range(20)) if p.lesion.sum() > 200)
    return resized(drawn, shape)


def resized(batch: FusionBatch, shape: Sequence[int]) -> FusionBatch:
    """The sources and masks over the same field of view, with nothing that only training sees."""
    before = batch.mri.shape[2:]

    def image(volume: Tensor) -> Tensor:
        return F.interpolate(volume, tuple(shape), mode="trilinear", align_corners=False)

    distance_mm = batch.lesion_distance_mm
    return replace(
        batch,
        mri=image(batch.mri),
        ct=image(batch.ct),
        roi=image(batch.roi.float()) > 0.5,
        spacing_mm=batch.spacing_mm
        * torch.tensor([a / b for a, b in zip(before, shape, strict=True)]),
        lesion_distance_mm=None if distance_mm is None else image(distance_mm),
        **dict.fromkeys(("reference", "clean_mri", "clean_ct", "clean_roi", "findings")),
    )


def noise(shape: Sequence[int], seed: int = 0) -> FusionBatch:
    """A batch of noise and of random masks: as dear as a head to a network, and there at once."""
    generator = torch.Generator().manual_seed(seed)

    def volume(channels: int = 1) -> Tensor:
        return torch.rand(1, channels, *shape, generator=generator) * 2 - 1

    return FusionBatch(
        mri=volume(),
        ct=volume(),
        roi=volume(len(ROI_NAMES)) > 0,
        spacing_mm=torch.tensor([[4.0, 2.0, 2.0]]),
        case_id=["noise"],
        reference=volume(),
    )
