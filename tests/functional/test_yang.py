import numpy as np
import pytest
import torch

from clinfuse.functional.eight_bit import eight_bit
from clinfuse.functional.yang import q_y


def similarity(w, a, b):
    """Wang & Bovik's (2002) index in one window; nothing to nothing is 1."""
    mean_a, mean_b = (w * a).sum(), (w * b).sum()
    var_a, var_b = (w * (a - mean_a) ** 2).sum(), (w * (b - mean_b) ** 2).sum()
    covariance = (w * (a - mean_a) * (b - mean_b)).sum()
    squares = mean_a**2 + mean_b**2
    luminance = 1 if squares < 1e-9 else 2 * mean_a * mean_b / squares
    structure = 1 if var_a + var_b < 1e-9 else 2 * covariance / (var_a + var_b)
    return luminance * structure, var_a, var_b


def by_definition(f, a, b):
    """Yang et al. (2008), Eq. 6 and 7, window by window."""
    taps = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
    w = np.outer(taps, taps) / taps.sum() ** 2
    scores = []
    for y, x in np.ndindex(f.shape[0] - 6, f.shape[1] - 6):
        here = np.s_[y : y + 7, x : x + 7]
        sources, var_a, var_b = similarity(w, a[here], b[here])
        to_a, to_b = similarity(w, a[here], f[here])[0], similarity(w, b[here], f[here])[0]
        share = 0.5 if var_a + var_b < 1e-9 else var_a / (var_a + var_b)
        both = share * to_a + (1 - share) * to_b
        scores.append(both if sources >= 0.75 else max(to_a, to_b))
    return np.mean(scores)


@pytest.mark.parametrize("shape", [(2, 1, 18, 19), (1, 1, 2, 16, 15)])
def test_it_is_what_its_definition_says(shape):
    mri = torch.rand(shape) * 2 - 1
    ct = mri + 0.3 * torch.randn(shape)
    ct[..., 8:] = torch.rand(*shape[:-1], shape[-1] - 8)  # alike on the left, unlike on the right
    mri[..., :10, -8:] = ct[..., :10, -8:] = -1  # a black corner
    ct = ct.clamp(-1, 1)
    fused = 0.7 * mri + 0.3 * ct
    levels = [eight_bit(image).double().numpy() for image in (fused, mri, ct)]
    for case, ours in enumerate(q_y(fused, mri, ct)):
        slices = zip(*(i[case].reshape(-1, *i.shape[-2:]) for i in levels), strict=True)
        expected = np.mean([by_definition(*three) for three in slices])
        assert ours.item() == pytest.approx(expected, abs=1e-4)  # variances in single precision


def test_identical_images_score_one_and_small_slices_nothing():
    image = torch.rand(1, 1, 12, 12)
    assert q_y(image, image, image).item() == pytest.approx(1)
    assert q_y(image[..., :6], image[..., :6], image[..., :6]).isnan().all()
