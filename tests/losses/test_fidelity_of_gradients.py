import pytest
import torch

from clinfuse.functional.qabf import gradients_kept, qabf
from clinfuse.functional.vif import SMALLEST, vif, visual_fidelity
from clinfuse.losses.fidelity_of_gradients import SourceFidelity


def pictures(size=44):
    """Two smooth pictures on black."""
    rough = torch.randn(2, 1, size, size)
    image = 2 * torch.nn.functional.avg_pool2d(rough, 5, 1, 2)
    image[..., :5, :] = -1
    return image.clamp(-1, 1).split(1)


def test_the_weights_multiply_what_is_lost_of_either():
    mri, ct = pictures()
    fused = (mri + ct) / 2
    expected = 3 * (1 - gradients_kept(fused, mri, ct))
    torch.testing.assert_close(SourceFidelity(3.0)(fused, mri, ct), expected)
    expected = expected + 2 * (1 - visual_fidelity(fused, mri, ct) / 2)
    torch.testing.assert_close(SourceFidelity(3.0, 2.0)(fused, mri, ct), expected)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_following_its_gradient_raises_the_metric_it_stands_for(weights):
    mri, ct = pictures()
    average = (mri + ct) / 2
    fused = average.clone().requires_grad_()
    optimizer = torch.optim.Adam([fused], lr=0.04)
    for _ in range(15):
        optimizer.zero_grad()
        SourceFidelity(*weights)(fused, mri, ct).sum().backward()
        optimizer.step()
    metric = qabf if weights[0] else vif
    assert metric(fused.detach(), mri, ct) > metric(average, mri, ct) + 0.05


def test_flat_pictures_have_a_finite_gradient():
    fused = torch.full((1, 1, 44, 44), -1.0, requires_grad=True)
    source = pictures()[0]
    for ct in (source, torch.full_like(source, -1.0)):
        loss = SourceFidelity(1.0, 1.0)(fused, source, ct)
        (gradient,) = torch.autograd.grad(loss.sum(), fused)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_patches_too_small_for_vif_are_refused_where_it_counts():
    small = torch.rand(1, 1, SMALLEST - 1, 60)
    assert SourceFidelity()(small, small, small).isfinite().all()
    with pytest.raises(ValueError, match="41 pixels"):
        SourceFidelity(information=0.5)(small, small, small)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="-1"):
        SourceFidelity(gradient=-1.0)
