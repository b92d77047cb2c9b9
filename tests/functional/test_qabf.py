import math

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from clinfuse.functional.eight_bit import eight_bit
from clinfuse.functional.qabf import gradients_kept, qabf

SOBEL_W = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
IDENTICAL = 0.9994 / (1 + math.exp(-15 * 0.5)) * 0.9879 / (1 + math.exp(-22 * 0.2))
"""Both sigmoids at 1."""


def pictures(*shape):
    """Smooth, with a black margin as medical pictures have."""
    image = torch.nn.functional.avg_pool2d(torch.randn(shape).flatten(0, -3), 3, 1, 1).view(shape)
    image[..., :3, :] = -1
    return image.clamp(-1, 1)


def by_definition(fused, mri, ct, fold):
    """Xydeas & Petrovic (2000), Eq. 1 to 8, pixel by pixel."""

    def strength_and_angle(image):
        w, h = (convolve2d(image, k[::-1, ::-1], mode="same") for k in (SOBEL_W, SOBEL_W.T))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.hypot(h, w), np.where(w == 0, math.pi / 2, np.arctan(h / w))

    kept = weight = 0.0
    own = strength_and_angle(fused)
    for source in (mri, ct):
        for g, a, g_f, a_f in zip(
            *(x.ravel() for x in (*strength_and_angle(source), *own)), strict=True
        ):
            if g == 0:
                continue
            ratio = min(g, g_f) / max(g, g_f)
            turned = abs(a - a_f)
            likeness = abs(turned - math.pi / 2) if fold else math.pi / 2 - turned
            by_strength = 0.9994 / (1 + math.exp(-15 * (ratio - 0.5)))
            by_angle = 0.9879 / (1 + math.exp(-22 * (likeness / (math.pi / 2) - 0.8)))
            kept, weight = kept + g * by_strength * by_angle, weight + g
    return kept / weight


@pytest.mark.parametrize("shape", [(2, 1, 14, 15), (2, 1, 3, 9, 10)])
def test_it_is_what_its_definition_says(shape):
    fused, mri, ct = (pictures(*shape) for _ in range(3))
    levels = [eight_bit(image).double().numpy() for image in (fused, mri, ct)]
    for case, ours in enumerate(qabf(fused, mri, ct)):
        rows = [image[case].reshape(-1, *shape[-2:]) for image in levels]
        apart = [np.pad(stack, ((0, 0), (0, 2), (0, 0))).reshape(-1, shape[-1]) for stack in rows]
        expected = by_definition(*(stack[:-2] for stack in apart), fold=False)
        if len(rows[0]) == 1:  # padding between slices is what lies beyond their border
            assert ours.item() == pytest.approx(expected, rel=1e-4)
        else:
            sums = [by_definition(*slices, fold=False) for slices in zip(*rows, strict=True)]
            assert min(sums) < ours.item() < max(sums)


def test_identical_images_score_both_sigmoids_at_one():
    image = pictures(2, 1, 16, 16)
    assert qabf(image, image, image).numpy() == pytest.approx(IDENTICAL, abs=1e-5)
    assert gradients_kept(image, image, image).numpy() == pytest.approx(IDENTICAL, abs=1e-5)


def test_a_flat_fused_image_keeps_nothing_and_flat_sources_have_nothing():
    flat, image = torch.full((1, 1, 16, 16), -1.0), pictures(1, 1, 16, 16)
    assert qabf(flat, image, image).item() < 1e-3
    assert qabf(image, flat, flat).isnan().all()


def test_the_differentiable_form_folds_orientations_and_does_not_round():
    fused, mri, ct = (pictures(1, 1, 14, 15).double() for _ in range(3))
    levels = [127.5 * (image[0, 0].numpy() + 1) for image in (fused, mri, ct)]
    expected = by_definition(*levels, fold=True)
    assert gradients_kept(fused, mri, ct).item() == pytest.approx(expected, rel=1e-6)


def test_the_differentiable_form_has_the_gradient_of_finite_differences():
    fused, mri, ct = (torch.rand(1, 1, 6, 7, dtype=torch.float64) - 0.5 for _ in range(3))
    assert torch.autograd.gradcheck(gradients_kept, (fused.requires_grad_(), mri, ct))


def test_the_gradient_is_finite_where_images_are_flat():
    flat = torch.full((1, 1, 8, 8), -1.0, requires_grad=True)
    source = pictures(1, 1, 8, 8)
    gradients_kept(flat, source, flat.detach()).sum().backward()
    assert flat.grad.isfinite().all()
