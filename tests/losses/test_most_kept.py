import pytest
import torch
import torch.nn.functional as F

from clinfuse.functional.qabf import qabf
from clinfuse.functional.vif import SMALLEST, vif
from clinfuse.losses.fidelity_of_gradients import SourceFidelity
from clinfuse.losses.most_kept import MostKept, content


@pytest.fixture
def pair():
    """Two smooth pictures with edges in different places, the second black for a good part."""
    h, w = torch.meshgrid(torch.linspace(-1, 1, 56), torch.linspace(-1, 1, 60), indexing="ij")
    rings = torch.cos(12 * (h**2 + w**2).sqrt()) * 0.6
    bar = torch.where((h.abs() < 0.2) & (w > -0.5), 0.8, -1.0)
    return rings[None, None], bar[None, None]


def test_more_is_kept_than_by_the_maximum(pair):
    brightest, lost = torch.maximum(*pair), SourceFidelity(1.0, 0.3)
    climbed = MostKept(steps=25)(*pair)
    assert climbed.abs().max() <= 1
    assert qabf(climbed, *pair) > qabf(brightest, *pair) + 0.02
    assert lost(climbed, *pair) < lost(brightest, *pair) - 0.02


def test_more_weight_on_vif_raises_it_at_the_cost_of_qabf(pair):
    gradients, both = (MostKept(information, steps=25)(*pair) for information in (0.0, 2.0))
    assert vif(both, *pair) > vif(gradients, *pair) + 0.05
    assert qabf(both, *pair) < qabf(gradients, *pair)


def test_a_case_does_not_see_the_others_and_flat_sources_stay_as_they_are(pair):
    flat = torch.full_like(pair[0], -1.0)
    climb = MostKept(steps=5)
    both = climb(torch.cat([pair[0], flat]), torch.cat([pair[1], flat]))
    torch.testing.assert_close(both[:1], climb(*pair))
    torch.testing.assert_close(both[1:], flat)


def test_black_around_the_pictures_is_left_out_and_changes_next_to_nothing(pair):
    mri, ct = (F.pad(source, (30, 40, 25, 35), value=-1.0) for source in pair)
    rows, columns = content(torch.maximum(mri, ct))
    assert (rows.start, rows.stop) == (25 - 16, 25 + 56 + 16)
    assert (columns.start, columns.stop) == (30 - 16, 30 + 60 + 16)
    climb = MostKept(steps=10)
    everywhere = climb._climb(torch.maximum(mri, ct), mri, ct)
    cut = climb(mri, ct)
    assert qabf(cut, mri, ct) == pytest.approx(
        qabf(everywhere, mri, ct).item(), abs=1e-2
    )  # where VIF's grid lies differs
    assert vif(cut, mri, ct) == pytest.approx(vif(everywhere, mri, ct).item(), abs=2e-2)


def test_the_window_around_a_small_thing_is_large_enough_for_vif():
    small = torch.full((1, 1, 90, 50), -1.0)
    small[..., 2:4, 48:] = 0.5
    rows, columns = content(small)
    assert len(range(90)[rows]) >= SMALLEST and len(range(50)[columns]) >= SMALLEST
    assert MostKept(steps=2)(small, small).shape == small.shape


def test_what_both_sources_show_black_stays_black(pair):
    mri, ct = (F.pad(source, (20, 20, 20, 20), value=-1.0) for source in pair)
    start = torch.maximum(mri, ct) + 0.02  # as a network leaves it
    climbed = MostKept(steps=5).climbed(start, mri, ct)
    air = torch.ones_like(mri, dtype=torch.bool)
    air[..., 20 - 2 : 76 + 2, 20 - 2 : 80 + 2] = False
    assert (climbed[air] == -1).all()
    assert (climbed != start)[..., 20:76, 20:80].any()
