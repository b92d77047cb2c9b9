import pytest
import torch

from clinfuse.losses.sources import SourceLoss
from clinfuse.methods.regional_weights import REGIONS, RegionalWeights, regions_of


def method(loss=None):
    built = RegionalWeights(loss or SourceLoss(1.0, 1.0, 1.0), torch.optim.Adam)
    built.log_dict = lambda *_, **__: None  # there is no trainer to log to
    return built


def test_every_voxel_has_one_region_lesion_before_bone_before_brain():
    roi = torch.tensor(
        [  # brain, bone, lesion
            [1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1],
        ]
    ).bool()  # fmt: skip
    found = regions_of(roi.T.reshape(1, 3, 2, 4)).reshape(4, 8).T
    assert (found.sum(1) == 1).all()
    names = [REGIONS[int(row.float().argmax())] for row in found]
    assert names == ["brain", "bone", "bone", "lesion", "lesion", "lesion", "elsewhere", "lesion"]


def test_fused_is_each_regions_own_weighted_mean(phantoms):
    batch, weighted = phantoms.batch(0.0, case=7), method()
    torch.testing.assert_close(weighted.fuse(batch), (batch.mri + batch.ct) / 2)
    shares = torch.tensor([0.9, 0.2, 0.6, 0.4])
    weighted.logits.data = torch.logit(shares)
    assert list(weighted.mri_weights) == ["brain", "bone", "lesion", "elsewhere"]
    fused = weighted.fuse(batch)
    for share, inside in zip(shares, regions_of(batch.roi)[0], strict=True):
        assert inside.any()
        expected = share * batch.mri[0, 0] + (1 - share) * batch.ct[0, 0]
        torch.testing.assert_close(fused[0, 0][inside], expected[inside])


def test_under_squared_error_the_weights_are_those_of_least_squares(phantoms):
    weighted, batch = method(SourceLoss(1.0, 0.0, 0.0)), phantoms.batch(2.0, case=7)
    optimizer = torch.optim.Adam(weighted.parameters(), lr=0.5)
    for _ in range(120):
        optimizer.zero_grad()
        weighted.training_step(batch, 0).backward()
        optimizer.step()
    for share, inside in zip(weighted.mri_weights.values(), regions_of(batch.roi)[0], strict=True):
        apart, wanted = ((x - batch.ct)[0, 0][inside] for x in (batch.mri, batch.reference))
        closed_form = ((apart * wanted).sum() / apart.square().sum()).clamp(0, 1).item()
        assert share == pytest.approx(closed_form, abs=0.02)  # the logistic nears its ends slowly


def test_a_region_that_no_case_has_keeps_its_weight(phantoms):
    weighted, batch = method(), phantoms.batch(2.0, case=7)
    batch.roi[:, 2] = False
    optimizer = torch.optim.Adam(weighted.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        weighted.training_step(batch, 0).backward()
        optimizer.step()
    moved = {region for region, share in weighted.mri_weights.items() if share != 0.5}
    assert moved == {"brain", "bone", "elsewhere"}
