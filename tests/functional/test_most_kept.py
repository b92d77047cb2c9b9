import pytest
import torch

from clinfuse.functional.most_kept import MostKept, kept_of_sources
from clinfuse.functional.qabf import qabf
from clinfuse.functional.vif import vif


@pytest.fixture
def pair():
    """Two smooth pictures with edges in different places, the second black for a good part."""
    h, w = torch.meshgrid(torch.linspace(-1, 1, 56), torch.linspace(-1, 1, 60), indexing="ij")
    rings = torch.cos(12 * (h**2 + w**2).sqrt()) * 0.6
    bar = torch.where((h.abs() < 0.2) & (w > -0.5), 0.8, -1.0)
    return rings[None, None], bar[None, None]


def test_more_is_kept_than_by_the_maximum(pair):
    brightest = torch.maximum(*pair)
    climbed = MostKept(steps=25)(*pair)
    assert climbed.abs().max() <= 1
    assert qabf(climbed, *pair) > qabf(brightest, *pair) + 0.02
    assert kept_of_sources(climbed, *pair, 0.15) > kept_of_sources(brightest, *pair, 0.15) + 0.02


def test_more_weight_on_vif_raises_it_at_the_cost_of_qabf(pair):
    gradients, both = (MostKept(visual, steps=25)(*pair) for visual in (0.0, 1.0))
    assert vif(both, *pair) > vif(gradients, *pair) + 0.05
    assert qabf(both, *pair) < qabf(gradients, *pair)


def test_a_case_does_not_see_the_others_and_flat_sources_stay_as_they_are(pair):
    flat = torch.full_like(pair[0], -1.0)
    climb = MostKept(steps=5)
    both = climb(torch.cat([pair[0], flat]), torch.cat([pair[1], flat]))
    torch.testing.assert_close(both[:1], climb(*pair))
    assert both.isfinite().all()
    torch.testing.assert_close(both[1:], flat)


def test_pictures_too_small_for_vif_climb_qabf_alone():
    mri, ct = (torch.rand(2, 1, 1, 20, 17) * 2 - 1).unbind(0)
    kept = kept_of_sources(mri, mri, ct, 0.5)
    torch.testing.assert_close(kept, kept_of_sources(mri, mri, ct, 0.0))
