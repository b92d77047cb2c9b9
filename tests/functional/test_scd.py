import numpy as np
import pytest
import torch

from clinfuse.functional.eight_bit import eight_bit
from clinfuse.functional.scd import correlation, scd


@pytest.mark.parametrize("shape", [(3, 1, 12, 13), (2, 1, 4, 9, 10)])
def test_it_is_the_sum_of_two_correlations_of_differences(shape):
    fused, mri, ct = torch.rand(3, *shape) * 2 - 1
    levels = (eight_bit(image).flatten(1).double().numpy() for image in (fused, mri, ct))
    expected = [
        np.corrcoef(f - c, m)[0, 1] + np.corrcoef(f - m, c)[0, 1]
        for f, m, c in zip(*levels, strict=True)
    ]
    np.testing.assert_allclose(scd(fused, mri, ct), expected, rtol=1e-5)


def test_the_sum_of_two_sources_has_two():
    mri, ct = torch.rand(2, 1, 1, 16, 16) * 0.9 - 1
    mri, ct = (eight_bit(image) / 127.5 - 1 for image in (mri, ct))
    assert scd(mri + ct + 1, mri, ct).item() == pytest.approx(2, abs=1e-5)


def test_it_is_undefined_where_the_fused_image_is_a_source():
    mri, ct = torch.rand(2, 2, 1, 8, 8)
    fused = torch.stack([mri[0], (mri[1] + ct[1]) / 2])
    assert scd(fused, mri, ct).isnan().tolist() == [True, False]


def test_correlation_is_undefined_for_a_constant_row():
    rows = torch.rand(2, 9, dtype=torch.float64)
    constant = rows.clone()
    constant[1] = 0.1
    ours = correlation(rows, constant)
    assert ours[0].item() == pytest.approx(1) and ours[1].isnan()
