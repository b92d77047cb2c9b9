"""The fusion field's own metrics by the names of its tables: how much of both sources is kept."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.contrast import average_gradient, spatial_frequency, standard_deviation
from clinfuse.functional.eight_bit import eight_bit
from clinfuse.functional.entropy import entropy, mutual_information
from clinfuse.functional.epi import epi
from clinfuse.functional.fmi import fmi_gradient, fmi_pixel, fmi_wavelet
from clinfuse.functional.fsim import fsim
from clinfuse.functional.qabf import qabf
from clinfuse.functional.scd import scd
from clinfuse.functional.source_ssim import ssim_published, ssim_sources
from clinfuse.functional.vif import vif
from clinfuse.functional.yang import q_y

OF_FUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "en": entropy,
    "sd": standard_deviation,
    "sf": spatial_frequency,
    "ag": average_gradient,
}
"""Of the fused image alone. Noise raises all four."""


def fsim_sources(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """FSIM to the MRI plus FSIM to the CT over the whole image; 2 is the most."""
    whole = torch.ones_like(fused, dtype=torch.bool)
    ours, *sources = (eight_bit(image) / 127.5 - 1 for image in (fused, mri, ct))
    return fsim(ours, sources[0], whole) + fsim(ours, sources[1], whole)


WITH_SOURCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mi": mutual_information,
    "scd": scd,
    "vif": vif,
    "qabf": qabf,
    "ssim_sources": ssim_sources,
    "ssim_published": ssim_published,
    "fmi_pixel": fmi_pixel,
    "fmi_gradient": fmi_gradient,
    "fmi_wavelet": fmi_wavelet,
    "fsim_sources": fsim_sources,
    "q_y": q_y,
    "epi": epi,
}
"""Of the fused image and both its sources."""

FUSION_METRICS = (*OF_FUSED, *WITH_SOURCES)
"""All of them, in the order of a table's columns; of each, more is meant to be better."""


def fusion_metrics(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> dict[str, Float[Tensor, " b"]]:
    """Every fusion metric of every case, in the order of ``FUSION_METRICS``.

    As published tables have them: of 8-bit pictures, levels 0 to 255. Of volumes en, sd, mi and scd
    are over all voxels, the others over the slices along d together: their windows and filters are
    defined in the plane, and voxels of a stroke CT are five times as thick as wide. NaN where a
    metric is undefined: a flat image, a slice smaller than a window (41 pixels for vif).

    Args:
        fused: in [-1, 1], as are ``mri`` and ``ct``.
    """
    alone = {name: metric(fused) for name, metric in OF_FUSED.items()}
    return alone | {name: metric(fused, mri, ct) for name, metric in WITH_SOURCES.items()}
