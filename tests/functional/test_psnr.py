import math

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

from clinfuse.functional.psnr import psnr


def test_psnr_agrees_with_scikit_image_on_the_region():
    fused, reference = torch.rand(2, 2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.3
    theirs = [
        peak_signal_noise_ratio(r[m].numpy(), f[m].numpy(), data_range=2.0)
        for f, r, m in zip(fused, reference, mask, strict=True)
    ]
    np.testing.assert_allclose(psnr(fused, reference, mask), theirs, rtol=1e-5)


def test_an_error_of_a_tenth_of_the_range_is_20_db_however_small_the_region():
    a = torch.zeros(1, 1, 4, 4)
    mask = torch.zeros(a.shape, dtype=torch.bool)
    mask[..., 0, 0] = True
    for data_range in (1.0, 2.0, 255.0):
        score = psnr(a + data_range / 10, a, mask, data_range).item()
        assert math.isclose(score, 20, rel_tol=1e-5)


def test_perfect_is_infinite_and_an_empty_region_is_nan():
    a = torch.zeros(2, 1, 4, 4)
    mask = torch.zeros(a.shape, dtype=torch.bool)
    mask[0] = True
    perfect, empty = psnr(a, a, mask).tolist()
    assert perfect == math.inf and math.isnan(empty)


def test_with_a_gradient_or_without_the_score_is_the_same():
    a, b = torch.rand(2, 2, 1, 5, 9, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(a.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    b[~mask] = torch.nan  # has no say
    learned = psnr(a.clone().requires_grad_(), b, mask)
    assert learned.requires_grad
    torch.testing.assert_close(psnr(a, b, mask), learned.detach())
