import pytest
import torch

from clinfuse.functional.haar import haar_dwt
from clinfuse.networks.band_masks import BandMasks


def bands(*shape):
    mri, ct = 2 * torch.rand(2, 2, 1, *shape) - 1
    return haar_dwt(mri), haar_dwt(ct)


@pytest.mark.parametrize("shape", [(12, 16), (8, 10, 12)])
def test_untrained_the_stronger_detail_wins_by_its_lead_and_the_approximation_is_halved(shape):
    mri, ct = bands(*shape)
    masks = BandMasks(len(shape), features=8, sharpness=6.0)(mri, ct)
    assert masks.shape == mri.shape
    torch.testing.assert_close(masks[:, :1], torch.full_like(masks[:, :1], 0.5))
    lead = torch.logit(masks[:, 1:].double()) / 6
    m, c = mri[:, 1:].abs(), ct[:, 1:].abs()
    torch.testing.assert_close(lead.float(), (m - c) / (m + c + 1e-3), atol=1e-2, rtol=0)


def test_coefficients_far_below_what_is_visible_are_shared():
    mri, ct = torch.full((1, 4, 4, 4), 1e-6), torch.full((1, 4, 4, 4), -3e-6)
    masks = BandMasks(2, features=4)(mri, ct)
    torch.testing.assert_close(masks, torch.full_like(masks, 0.5), atol=0.01, rtol=0)


def test_a_step_of_training_reaches_every_weight():
    network, (mri, ct) = BandMasks(2, features=8), bands(16, 16)
    with torch.no_grad():  # the last layer starts at zero, and nothing before it learns until then
        network.last.weight.normal_()
    (network(mri, ct) * torch.randn_like(mri)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in network.parameters())


def test_masks_stay_shares_in_single_precision_under_autocast():
    network, (mri, ct) = BandMasks(3, features=4), bands(8, 8, 8)
    with torch.no_grad():
        network.last.weight.normal_(std=10)
    with torch.autocast("cpu", torch.bfloat16):
        masks = network(mri, ct)
    assert masks.dtype == torch.float32 and masks.min() >= 0 and masks.max() <= 1


def test_a_network_of_slices_refuses_volumes_and_one_of_lines_is_not_built():
    with pytest.raises(ValueError, match=r"images of 2 axes \(spatial_dims\), got 3"):
        BandMasks(2, features=4)(*bands(4, 4, 4))
    with pytest.raises(ValueError, match="spatial_dims 2 or 3, got 1"):
        BandMasks(1)
