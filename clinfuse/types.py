"""The words every layer shares: a batch of studies, its regions of interest, a denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CtMap = Literal["piecewise", "window_40_400", "window_8bit"]
"""How CT becomes model space: the default on HU, the stroke window, or an 8-bit window as is."""

ROI_NAMES = ("brain", "bone", "lesion")
"""Order of the channels of every ``roi`` tensor."""

DATA_RANGE = 2.0
"""Width of model space [-1, 1]: the one data range of every PSNR and SSIM."""

Denoiser = Callable[[Float[Tensor, "b c *dhw"], Float[Tensor, " b"]], Float[Tensor, "b c *dhw"]]
"""Maps (x_t, alpha_bar_t) to the estimate x0_hat of the clean volume, in the shape of x_t."""


@dataclass
class FusionBatch:
    """A batch of MRI-CT studies on one grid, in model space [-1, 1].

    ``mri``, ``ct`` and ``roi`` are what a method may see: noisy, with CT and bone mask possibly
    moved against the MRI. The ``clean_*`` fields and ``reference`` are the truth that losses and
    metrics compare with; they stay in the MRI's frame. Where a study has no clean pair of its own,
    they are the sources before any perturbation.

    Attributes:
        mri: MRI, in [-1, 1].
        ct: CT, in [-1, 1], perhaps misregistered.
        roi: masks in ``ROI_NAMES`` order; brain and lesion in MRI space, bone moved with the CT,
            and the brain too where it was segmented in that.
        spacing_mm: voxel size, one row a case, in the order of the spatial axes.
        case_id: one patient's MRI-CT pair each.
        reference: the fused volume to aim at, in MRI space.
        clean_mri: registered noise-free MRI.
        clean_ct: registered noise-free CT.
        clean_roi: the true masks, registered.
        lesion_distance_mm: signed distance to the lesion's border, negative inside, NaN-free;
            a large constant where there is no lesion.
        misregistration: homogeneous matrix A in mm about the grid's centre, spatial axes in
            tensor order: what lies at p in the clean CT lies at A p in ``ct``. The displacement
            that realigns it is u(p) = A p - p, with clean(p) = ct(p + u(p)).
        findings: haemorrhage and calcification in the brain that only the CT shows, where they
            are in truth; for evaluation, no method may see them.
        ct_map: how each case's CT units became model space ; what
            speaks of Hounsfield units needs it. Empty where it is not known.
    """

    mri: Float[Tensor, "b 1 *dhw"]
    ct: Float[Tensor, "b 1 *dhw"]
    roi: Bool[Tensor, "b r *dhw"]
    spacing_mm: Float[Tensor, "b n"]
    case_id: Sequence[str]
    reference: Float[Tensor, "b 1 *dhw"] | None = None
    clean_mri: Float[Tensor, "b 1 *dhw"] | None = None
    clean_ct: Float[Tensor, "b 1 *dhw"] | None = None
    clean_roi: Bool[Tensor, "b r *dhw"] | None = None
    lesion_distance_mm: Float[Tensor, "b 1 *dhw"] | None = None
    misregistration: Float[Tensor, "b n_plus_1 n_plus_1"] | None = None
    findings: Bool[Tensor, "b 1 *dhw"] | None = None
    ct_map: Sequence[CtMap] = ()

    def __len__(self) -> int:
        return len(self.case_id)

    @property
    def brain(self) -> Bool[Tensor, "b 1 *dhw"]:
        return self.roi[:, 0:1]

    @property
    def bone(self) -> Bool[Tensor, "b 1 *dhw"]:
        return self.roi[:, 1:2]

    @property
    def lesion(self) -> Bool[Tensor, "b 1 *dhw"]:
        return self.roi[:, 2:3]

    def truth(
        self,
    ) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"], Bool[Tensor, "b r *dhw"]]:
        """MRI, CT and masks to compare with: the clean ones, else the sources."""
        mri = self.mri if self.clean_mri is None else self.clean_mri
        ct = self.ct if self.clean_ct is None else self.clean_ct
        return mri, ct, self.roi if self.clean_roi is None else self.clean_roi

    def to(self, device: torch.device | str) -> "FusionBatch":
        """The same batch on another device; Lightning moves batches by this method."""
        return replace(self, **{name: t.to(device) for name, t in self._tensors().items()})

    def repeat(self, times: int) -> "FusionBatch":
        """The batch with every case repeated ``times`` times in place: a a b b for two cases."""
        tensors = {name: t.repeat_interleave(times, 0) for name, t in self._tensors().items()}
        return replace(
            self,
            **tensors,
            case_id=[case for case in self.case_id for _ in range(times)],
            ct_map=[ct_map for ct_map in self.ct_map for _ in range(times)],
        )

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass
class SliceBatch(FusionBatch):
    """A batch of 2-D pairs, rows from top to bottom as in their files.

    ``mri`` is the anatomical source of the pair and ``ct`` the luma of the other: CT, PET, SPECT,
    fluorescence or visible light. Real pairs have no reference and no noise-free originals.

    Attributes:
        chroma: Cb and Cr of the second source, which a method does not see, moved as ``ct`` is;
            zero where that is grey, None where it is grey by its kind.
    """

    chroma: Float[Tensor, "b 2 *dhw"] | None = None
