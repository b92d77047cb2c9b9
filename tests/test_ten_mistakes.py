"""The ten mistakes of section 4 of the method, which make results worthless: one test for each.

Each is a short guard from end to end. The thorough tests stand with the code they test:

1. steps on a subset: ``diffusion/samplers/test_ddim.py`` (MONAI, order of convergence),
   ``test_ddpm.py``, ``test_dpm_solver.py``
2. a lesion head with gradients: ``losses/test_lesion.py``, ``losses/test_roi.py``,
   ``methods/test_lesion_head.py``, ``methods/test_roi_diffusion.py``
3. NSD and HD95 with gradients: ``losses/test_lesion.py`` (finite differences, descent)
4. U and Eq. 4: ``diffusion/test_ensemble.py``, ``diffusion/test_guidance.py``,
   ``methods/test_roi_diffusion.py``
5. SSIM local and unclamped: ``functional/test_ssim.py``, ``losses/test_roi.py``
6. means over the region: ``functional/test_regional.py``, ``losses/test_roi.py``
7. lesion scores: ``functional/test_surface.py``, ``metrics/test_suite.py``,
   ``metrics/test_regional.py``, ``callbacks/test_recorder.py``
8. a confidence on a fixed scale: ``diffusion/test_ensemble.py``
9. one data range: ``functional/test_psnr.py``, ``metrics/test_regional.py``
10. augmentation that is applied: ``data/test_paired_volumes.py``
"""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from clinfuse.diffusion.ensemble import ensemble_uncertainty, normalised_uncertainty
from clinfuse.diffusion.guidance import roi_guide
from clinfuse.diffusion.samplers.ddim import ddim
from clinfuse.diffusion.schedule import cosine, levels_for
from clinfuse.functional.psnr import psnr
from clinfuse.functional.ssim import ssim
from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.methods.objective import clean_roi_loss
from clinfuse.metrics.suite import case_metrics
from clinfuse.reporting.rows import case_rows
from clinfuse.reporting.tables import summary


@pytest.fixture
def infarct(phantoms):
    """A head with a large infarct, its CT moved by 2 mm."""
    return phantoms.batch(2.0, case=7)


@pytest.fixture
def head(phantoms):
    """A lesion head, untrained and frozen."""
    return phantoms.method("lesion_head").requires_grad_(False).eval()


def test_1_ten_steps_of_a_thousand_end_at_the_data_and_not_in_the_noise():
    mean, std = 0.3, 0.1  # Gaussian voxels: the best denoiser and the exact end are known

    def denoise(x_t, alpha_bar_t):
        a = alpha_bar_t[0]
        return mean + a.sqrt() * std**2 / (a * std**2 + 1 - a) * (x_t - a.sqrt() * mean)

    x_T = torch.randn(1, 1, 8, 8, 8)
    x_0 = ddim(denoise, x_T, levels_for(cosine(1000), 10))
    # coefficients of consecutive timesteps would have removed a hundredth of the noise by now
    assert (x_0 - (mean + std * x_T)).abs().mean() < 0.5 * std


@pytest.mark.parametrize("lambdas", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_2_and_3_dice_nsd_and_hd95_each_move_the_fused_volume_through_the_frozen_head(
    infarct, head, lambdas
):
    lesion_only = ClinicalRoiLoss(alpha=0.0, beta=0.0, gamma=1.0, lambdas=lambdas)
    fused = infarct.reference.clone().requires_grad_()
    clean_roi_loss(lesion_only, fused, infarct, head).sum().backward()
    assert fused.grad.isfinite().all() and fused.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in head.parameters())


def test_4_the_members_spread_guides_them_and_modulates_guidance_voxel_by_voxel():
    x_t = torch.randn(3, 1, 4, 4, 4)
    spread = torch.linspace(0, 1, 4).view(1, 1, 1, 1, 4)
    x0_hat = (torch.randn(3, 1, 4, 4, 4) * spread).requires_grad_()
    (slope,) = torch.autograd.grad(ensemble_uncertainty(x0_hat, 3).sum(), x0_hat)
    assert slope[..., 1:].abs().min(0).values.max() > 0

    def correction(**settings):
        guide = roi_guide(
            lambda x: (x + 10).sum((1, 2, 3, 4)), gradient="x0", members=3, **settings
        )
        return guide(x_t, 0.5, x0_hat.detach())

    assert correction(eta=0.0, eta_u=0.05, kappa=0.5).abs().max() > 0
    modulated = correction(eta=0.2, eta_u=0.0, kappa=5.0)  # of a loss whose slope is 1 everywhere
    assert modulated[..., 3].mean() > 1.2 * modulated[..., 0].mean()
    assert modulated[..., 0].mean().item() == pytest.approx(0.1)  # eta / 2 where all agree


def test_5_ssim_is_negative_for_an_inverted_image_and_sees_where_things_are(infarct):
    image, spacing_mm, whole = infarct.clean_ct, infarct.spacing_mm, torch.ones_like(infarct.bone)
    texture = torch.rand(image.shape) * 2
    assert ssim(texture, 2 - texture, whole, spacing_mm) < 0
    shuffled = image.flatten()[torch.randperm(image.numel())].reshape(image.shape)
    # one global statistic cannot tell a shuffled image from a slightly shifted one
    assert ssim(image + 1, shuffled + 1, whole, spacing_mm) < 0.5
    assert ssim(image + 1, image.roll(1, 4) + 1, whole, spacing_mm) > 0.5


def test_6_air_around_the_head_changes_no_regional_loss(infarct):
    def padded(batch):
        volumes = {name: t for name, t in vars(batch).items() if torch.is_tensor(t) and t.ndim == 5}
        return replace(
            batch,
            **{
                name: F.pad(volume, [8] * 6, value=False if volume.dtype == torch.bool else -1.0)
                for name, volume in volumes.items()
            },
        )

    loss = ClinicalRoiLoss(fidelity=(1.0, 1.0))
    wide = padded(infarct)
    small = clean_roi_loss(loss, 0.5 * infarct.mri, infarct)
    torch.testing.assert_close(clean_roi_loss(loss, 0.5 * wide.mri, wide), small, rtol=1e-3, atol=0)


def test_7_no_lesion_and_no_prediction_is_undefined_and_counted_not_perfect(phantoms, infarct):
    healthy = phantoms.batch(0.0, case=6)
    assert not healthy.clean_roi[:, 2].any()
    rows = []
    for batch in (healthy, infarct):
        nothing = torch.zeros_like(batch.mri)
        (scores,) = case_metrics(batch.reference, batch, nothing)
        key = {"method": "blind", "preset": "stroke", "seed": 0, "mask_source": "none", "steps": 0}
        rows += case_rows(scores, case_id=batch.case_id[0], misregistration_mm=0.0, **key)
    dice = pd.DataFrame(rows).query("metric == 'dice'").set_index("case_id")["value"]
    assert dice["case_006"] != dice["case_006"] and dice["case_007"] == 0
    row = summary(rows).query("metric == 'dice'").iloc[0]
    assert (row["mean"], row["n"], row["undefined"]) == (0, 1, 1)
    (scores,) = case_metrics(infarct.reference, infarct)  # no prediction: no score to flatter with
    assert not {"dice", "nsd", "hd95"} & {m for _, m, _ in scores}


def test_8_a_case_on_which_all_members_agree_is_certain_everywhere():
    agreed = normalised_uncertainty(torch.full((1, 1, 4, 4, 4), 1e-8), reference_std=0.1)
    assert agreed.max() < 1e-5  # the smallest and the largest of one case are both certain
    mixed = torch.full((1, 1, 4, 4, 4), 0.01)
    mixed[..., 0] = 25.0
    alone = normalised_uncertainty(mixed[..., 1:], 0.1)
    torch.testing.assert_close(normalised_uncertainty(mixed, 0.1)[..., 1:], alone)


def test_9_the_same_error_is_the_same_psnr_in_a_case_of_any_contrast(infarct):
    whole = torch.ones_like(infarct.bone)
    error = 0.05 * torch.randn_like(infarct.reference)
    for contrast in (1.0, 0.1):
        pale = contrast * infarct.reference
        expected = 10 * torch.log10(4 / error.square().mean())  # model space is 2 wide
        torch.testing.assert_close(psnr(pale + error, pale, whole)[0], expected, rtol=1e-4, atol=0)


def test_10_jitter_and_augmentation_of_the_configuration_reach_the_network(phantoms):
    def drawn(*overrides):
        data = phantoms.data("data.draws_per_epoch=12", *overrides)
        return data, list(data.train_dataloader())

    data, draws = drawn()
    moved = [not torch.allclose(d.misregistration[0], torch.eye(4)) for d in draws]
    assert sum(moved) >= 8  # with probability 0.9
    changed = [not torch.equal(d.clean_mri[0], data.study(d.case_id[0]).clean_mri) for d in draws]
    assert all(changed)  # by gamma, if by nothing else
    data, draws = drawn("data.jitter=null", "data.augmentation=null")
    for draw in draws:
        study = data.study(draw.case_id[0])
        assert torch.equal(draw.mri[0], study.mri) and torch.equal(draw.ct[0], study.ct)
        assert torch.equal(draw.reference[0], study.reference)
