"""The anchor of the diffusion: a registration-aware blend of the sources, and how sure it is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clinfuse.functional.composite import feathered, shown_findings
from clinfuse.functional.intensity import ct_from_model, leaky_clamp
from clinfuse.networks.fusion_unet import Condition, FusionUNet
from clinfuse.networks.rigid_registration import (
    Registration,
    SynthesisRegistration,
    gradient_per_mm,
    move,
)
from clinfuse.networks.source_denoiser import SourceDenoisers
from clinfuse.roi.findings import ct_dense_findings
from clinfuse.types import FusionBatch


@dataclass
class Anchor:
    """What the diffusion starts from: F = mean + scale * r, r being what is left to sample.

    Attributes:
        mean: mu(c), in model space.
        scale: s(c) > 0, the error of ``mean`` expected at each voxel.
        mri: the MRI, without the noise that the anchor saw in it, and with what only the CT shows
            in the brain.
        ct: the CT likewise, where the anchor believes it belongs.
        roi: the masks as floats, the CT's own moved with it.
        ct_weight: how much of each voxel comes from the CT, in [0, 1].
        registration: the motion found and the guess it came from; None without registration.
    """

    mean: Float[Tensor, "b 1 *dhw"]
    scale: Float[Tensor, "b 1 *dhw"]
    mri: Float[Tensor, "b 1 *dhw"]
    ct: Float[Tensor, "b 1 *dhw"]
    roi: Float[Tensor, "b r *dhw"]
    ct_weight: Float[Tensor, "b 1 *dhw"]
    registration: Registration | None

    def repeat(self, times: int) -> "Anchor":
        """Every case ``times`` times in place (a a b b)."""
        volumes = ("mean", "scale", "mri", "ct", "roi", "ct_weight")
        repeated: dict[str, Any] = {
            n: getattr(self, n).repeat_interleave(times, 0) for n in volumes
        }
        return replace(self, **repeated)


class RegisteredBlend(nn.Module):
    """mu(c) = w warp(I_C, u) + (1 - w) I_M + d, with an error scale s(c) beside it.

    method.md section 3, "The mean as a registration-aware blend". ``registration`` predicts where
    (u), ``denoisers`` take the noise out of I_M and the moved I_C, ``network`` predicts what: the
    blend weight w, the correction d and log s. The weight starts from the moved bone mask, kept
    out of the brain mask (which is the MRI's own and does not move), so an untrained blend is the
    mask composite of the registered sources.

    Args:
        network: builds the U-Net that returns w, d and log s, given its channels of state (none),
            knowledge (the registration's guess of the CT and its error scale) and output.
        registration: the rigid motion that realigns the CT; None takes the CT as it lies.
        denoisers: of the two sources; None takes them as they are.
        noise_scale: error expected before training where the blend is flat, in model space.
        misplaced_mm: how far edges may be misplaced before training.
        lost_gain: size of the error expected before training where interpolation loses detail, in
            units of ``lost_in_moving``. Above 1: the loss on the way there and back is the
            smaller for what the first way has smoothed, and CTs often come resampled already.
        min_scale: lower bound of s, in model space.
        bone_logit: logit of w inside the bone mask (and minus that outside) before training.
    """

    def __init__(
        self,
        network: Callable[..., FusionUNet],
        registration: SynthesisRegistration | None = None,
        denoisers: SourceDenoisers | None = None,
        noise_scale: float = 0.03,
        misplaced_mm: float = 0.3,
        lost_gain: float = 2.0,
        min_scale: float = 0.005,
        bone_logit: float = 8.0,
    ) -> None:
        super().__init__()
        known = 0 if registration is None else 2
        self.network = network(state_channels=0, known_channels=known, out_channels=3)
        self.registration, self.denoisers = registration, denoisers
        self.min_scale, self.bone_logit = min_scale, bone_logit
        self.noise_scale, self.misplaced_mm = noise_scale, misplaced_mm
        self.lost_gain = lost_gain

    def forward(self, batch: FusionBatch) -> Anchor:
        roi, mri, ct = batch.roi.to(batch.ct.dtype), batch.mri, batch.ct
        brain, bone, lesion = roi.split(1, 1)
        found, lost = None, torch.zeros_like(ct)
        with torch.no_grad():  # the sources are prepared by networks trained for that, and before
            if self.registration is not None:
                found = self.registration(mri, ct, brain, batch.spacing_mm)
                given, ct = ct, move(ct, found.motion, batch.spacing_mm, refine=3)
                lost = lost_in_moving(given, ct, found.motion, batch.spacing_mm)
                ct = ct.clamp(-1, 1)
                bone = move(bone, found.motion, batch.spacing_mm)
            if self.denoisers is not None:
                mri = self.denoisers.mri(mri).clamp(-1, 1)
                ct = self.denoisers.ct(ct).clamp(-1, 1)
            findings = dense_findings(ct, bone > 0.5, batch)
            mri = with_findings(mri, ct, findings, batch)
        roi = torch.cat([brain, bone, lesion], 1)
        brain, bone, lesion = roi.split(1, 1)  # no other copy of them is held from here on
        out = self.network(None, self._encoded(mri, ct, roi, found)).float()
        weight_logit, correction, log_scale = out.split(1, 1)
        prior = self.bone_logit * (2 * bone - 1 - 2 * brain)
        weight = torch.sigmoid(weight_logit + prior)
        mean = leaky_clamp(weight * ct + (1 - weight) * mri + correction)
        if findings is not None:  # as the MRI shows them by now, whatever the blend made of them
            mean = torch.lerp(mean, mri, feathered(findings, batch.spacing_mm).to(mean))
        share = bone * (1 - brain)
        expected = self._expected_error(mean, weight, share, mri, ct, lost, batch).detach()
        scale = self.min_scale + expected * log_scale.clamp(-6, 3).exp()
        return Anchor(mean, scale, mri, ct, roi, weight, found)

    def _encoded(
        self, mri: Tensor, ct: Tensor, roi: Tensor, found: Registration | None
    ) -> Condition:
        known = None if found is None else torch.cat([found.guess, found.log_scale], 1)
        return self.network.encode(mri, ct, roi, known)

    @torch.no_grad()
    def registered_roi(self, batch: FusionBatch) -> Bool[Tensor, "b r *dhw"]:
        """The masks, the CT's own where the registration puts it: ``Anchor.roi`` cut at 1/2."""
        if self.registration is None:
            return batch.roi
        roi = batch.roi.to(batch.ct.dtype)
        brain, bone, lesion = roi.split(1, 1)
        found = self.registration(batch.mri, batch.ct, brain, batch.spacing_mm)
        bone = move(bone, found.motion, batch.spacing_mm)
        return torch.cat([brain, bone, lesion], 1) > 0.5

    def _expected_error(
        self,
        mean: Tensor,
        weight: Tensor,
        share: Tensor,
        mri: Tensor,
        ct: Tensor,
        lost: Tensor,
        batch: FusionBatch,
    ) -> Tensor:
        """What s is before any training: noise, the choice between the sources, misplaced edges,
        and detail too fine to be moved.

        If the reference takes a voxel from the CT with probability p, here the share of it that
        the moved bone mask fills, and else from the MRI, then mu misses it by
        p (mu - I_C)^2 + (1 - p) (mu - I_M)^2 on average. The weight w does not say p: L_ROI's
        windows reach out of the bone, and draw w with them.
        """
        choice = share * (mean - ct).square() + (1 - share) * (mean - mri).square()
        blend = weight * ct + (1 - weight) * mri
        edges = self.misplaced_mm * slope_per_mm(blend, batch.spacing_mm)
        moved = self.lost_gain * weight * lost
        return (self.noise_scale**2 + choice + edges.square() + moved.square()).sqrt()


def dense_findings(
    ct: Float[Tensor, "b 1 *dhw"], bone: Bool[Tensor, "b 1 *dhw"], batch: FusionBatch
) -> Bool[Tensor, "b 1 *dhw"] | None:
    """The haemorrhages and calcifications that a registered CT shows in the brain; None for none.

    "Nothing visible may vanish" (method.md section 3), and what is dense in the CT is known by its
    Hounsfield units, so this is not left to a network that sees one such case in three. A case
    whose CT is not in HU has none.

    Args:
        ct: registered, and better without noise.
        bone: the CT's own mask, moved with it: where a CT is not registered after all its skull
            lies in the brain, and is no calcification.
        batch: for its brain mask, voxel size and the units of its CT.
    """
    if ct.ndim != 5:
        return None
    found = torch.zeros_like(batch.brain)
    for case, ct_map in enumerate(batch.ct_map):
        if ct_map != "window_8bit":
            ct_hu = ct_from_model(ct[case, 0].float(), ct_map).cpu().numpy()
            brain = (batch.brain & ~bone)[case, 0].cpu().numpy()
            spacing_mm = batch.spacing_mm[case].tolist()
            found[case, 0] = torch.from_numpy(ct_dense_findings(ct_hu, brain, spacing_mm))
    return found if found.any() else None


def with_findings(
    volume: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
    findings: Bool[Tensor, "b 1 *dhw"] | None,
    batch: FusionBatch,
) -> Float[Tensor, "b 1 *dhw"]:
    """The volume with the findings shown on it as the reference shows them."""
    if findings is None:
        return volume
    cases = [
        shown_findings(v[None], c[None], f[None], brain[None], spacing[None], ct_map=ct_map)
        for v, c, f, brain, spacing, ct_map in zip(
            volume, ct, findings, batch.brain, batch.spacing_mm, batch.ct_map, strict=True
        )
    ]
    return torch.cat(cases)


def lost_in_moving(
    given: Float[Tensor, "b 1 *dhw"],
    moved: Float[Tensor, "b 1 *dhw"],
    motion: Float[Tensor, "b m m"],
    spacing_mm: Float[Tensor, "b n"],
) -> Float[Tensor, "b 1 *dhw"]:
    """How much interpolation takes at each voxel: |given - moved, moved back|, where it is moved.

    Nothing for a shift of whole voxels, and most for half of one: a skull of a voxel's thickness
    does not survive that, however well it is registered.

    Args:
        given: the volume as it lies.
        moved: given(A p).
        motion: A, in mm about the grid's centre.
        spacing_mm: voxel size.
    """
    back = move(moved, torch.linalg.inv(motion), spacing_mm, refine=2)
    return move((given - back).abs(), motion, spacing_mm)


def slope_per_mm(
    volume: Float[Tensor, "b 1 *dhw"], spacing_mm: Float[Tensor, "b n"]
) -> Float[Tensor, "b 1 *dhw"]:
    """Magnitude of the gradient by central differences, in units a mm."""
    return gradient_per_mm(volume, spacing_mm).square().sum(1, keepdim=True).sqrt()


class NoAnchor(nn.Module):
    """mu = 0 and s = 1: plain diffusion of F itself, for the comparison with the anchored form."""

    registration = None
    denoisers = None

    def forward(self, batch: FusionBatch) -> Anchor:
        zeros = torch.zeros_like(batch.mri)
        return Anchor(
            mean=zeros,
            scale=torch.ones_like(zeros),
            mri=batch.mri,
            ct=batch.ct,
            roi=batch.roi.to(zeros.dtype),
            ct_weight=zeros,
            registration=None,
        )

    def registered_roi(self, batch: FusionBatch) -> Bool[Tensor, "b r *dhw"]:
        """The masks as given."""
        return batch.roi
