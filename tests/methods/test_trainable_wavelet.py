import pytest
import torch
from torch import nn

from clinfuse.functional.intensity import leaky_clamp
from clinfuse.losses.sources import SourceLoss
from clinfuse.methods.selection import larger_magnitude, mean
from clinfuse.methods.trainable_wavelet import TrainableWavelet
from clinfuse.methods.wavelet import Wavelet
from clinfuse.networks.band_masks import BandMasks
from clinfuse.types import FusionBatch


def pair(*shape):
    mri, ct = 2 * torch.rand(2, 2, 1, *shape) - 1
    roi = torch.zeros(2, 3, *shape, dtype=torch.bool)
    return FusionBatch(mri, ct, roi, torch.ones(2, len(shape)), ["a", "b"])


def method(network, loss=None):
    return TrainableWavelet(network, loss or SourceLoss(1.0, 1.0, 10.0), torch.optim.AdamW)


class Always(nn.Module):
    """Masks of one value, the same for every coefficient."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, mri, ct):
        return torch.full_like(mri, self.share)


@pytest.mark.parametrize("shape", [(16, 18), (17, 23), (1, 7), (8, 10, 12), (7, 9, 11)])
def test_masks_of_one_give_back_the_mri_and_masks_of_zero_the_ct(shape):
    batch = pair(*shape)
    for share, source in ((1.0, batch.mri), (0.0, batch.ct), (0.5, (batch.mri + batch.ct) / 2)):
        torch.testing.assert_close(method(Always(share)).fuse(batch), source, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(24, 30), (8, 12, 10)])
def test_untrained_it_is_the_max_abs_rule_but_for_its_softness(shape):
    batch = pair(*shape)
    rule = Wavelet("haar", 1, larger_magnitude, mean).fuse(batch)
    hard = method(BandMasks(len(shape), features=4, sharpness=1e6)).fuse(batch)
    agrees = (hard - rule).abs() < 1e-5  # a coefficient as large in both has no stronger one
    assert agrees.float().mean() > 0.99
    soft = method(BandMasks(len(shape), features=4)).fuse(batch)
    error = (soft - rule).square().mean()
    assert 0 < error < 0.05 * (batch.mri - batch.ct).square().mean()


def test_what_is_trained_is_differentiable_from_the_sources_to_the_loss():
    batch = pair(9, 12)
    for source in ("mri", "ct"):
        values = getattr(batch, source).requires_grad_()
        fused = method(BandMasks(2, features=4))._blend(batch)
        (slope,) = torch.autograd.grad(fused.square().sum(), values)
        assert slope.isfinite().all() and (slope != 0).float().mean() > 0.99


def test_its_loss_is_against_the_reference_that_a_phantom_has(phantoms):
    trained, batch = phantoms.method("trainable_wavelet"), phantoms.batch(4.0)
    trained.log_dict = lambda *_, **__: None  # there is no trainer to log to
    reference = batch.reference
    terms = trained.loss(leaky_clamp(trained.fuse(batch)), reference, reference, batch.spacing_mm)
    torch.testing.assert_close(
        trained.training_step(batch, 0), terms.total.mean(), rtol=1e-3, atol=0
    )


def test_a_few_steps_lower_its_loss_which_is_below_that_of_the_wavelet_rule(phantoms):
    trained, batch = phantoms.method("trainable_wavelet"), phantoms.batch(2.0)
    trained.log_dict = lambda *_, **__: None
    aim = batch.reference
    rule = phantoms.method("wavelet").fuse(batch)
    of_the_rule = trained.loss(rule, aim, aim, batch.spacing_mm).total.mean()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = trained.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0] and losses[-1] < of_the_rule


def test_a_method_of_slices_refuses_volumes():
    with pytest.raises(ValueError, match=r"images of 2 axes \(spatial_dims\), got 3"):
        method(BandMasks(2, features=4)).fuse(pair(4, 4, 4))
