import pytest
import torch

from clinfuse.losses.perceptual import perceptual_distance


def features(*shapes):
    return [torch.rand(2, *shape) for shape in shapes]


SHAPES = ((3, 8, 8), (5, 4, 4))


def test_features_of_the_stronger_source_cost_nothing_at_any_length():
    mri, ct = features(*SHAPES), features(*SHAPES)
    stronger = [
        torch.where(m.norm(dim=1, keepdim=True) >= c.norm(dim=1, keepdim=True), m, c)
        for m, c in zip(mri, ct, strict=True)
    ]
    distance = perceptual_distance([0.3 * s for s in stronger], mri, ct)
    torch.testing.assert_close(distance, torch.zeros(2), atol=1e-6, rtol=0)


def test_orthogonal_features_are_two_apart_and_opposite_ones_four():
    one, other = torch.zeros(2, 1, 2, 6, 6).unbind(0)
    one[:, 0] = other[:, 1] = 1
    nothing = [torch.zeros_like(one)]
    torch.testing.assert_close(perceptual_distance([one], [other], nothing), torch.tensor([2.0]))
    torch.testing.assert_close(perceptual_distance([-one], [one], nothing), torch.tensor([4.0]))


def test_scales_count_alike_however_many_voxels_they_have():
    seen, fine, coarse = torch.ones(1, 1, 16, 16), torch.ones(1, 1, 16, 16), torch.ones(1, 1, 2, 2)
    levels = ([seen, -coarse], [fine, coarse], [fine, coarse])
    torch.testing.assert_close(perceptual_distance(*levels), torch.tensor([2.0]))


@pytest.mark.parametrize("shapes", [SHAPES, ((3, 4, 6, 6), (5, 2, 3, 3))], ids=["2-D", "3-D"])
def test_a_step_down_its_gradient_lowers_it_and_voxels_without_features_do_no_harm(shapes):
    mri, ct, fused = features(*shapes), features(*shapes), features(*shapes)
    for level in (mri[0], ct[0], fused[0]):
        level[:, :, :2] = 0  # as after a ReLU
    fused = [level.requires_grad_() for level in fused]
    before = perceptual_distance(fused, mri, ct).sum()
    slopes = torch.autograd.grad(before, fused)
    assert all(slope.isfinite().all() for slope in slopes)
    moved = [f - 0.1 * slope for f, slope in zip(fused, slopes, strict=True)]
    assert perceptual_distance(moved, mri, ct).sum() < before
