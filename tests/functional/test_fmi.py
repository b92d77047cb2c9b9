import numpy as np
import pytest
import torch

from clinfuse.functional.eight_bit import eight_bit, eight_bit_slices
from clinfuse.functional.fmi import (
    fmi_gradient,
    fmi_pixel,
    fmi_wavelet,
    meyer_bands,
    scores_by_definition,
    window_scores,
)


def score(a, f):
    """One window by the definition: Nelsen's joint distribution over all 81 cells."""
    if np.array_equal(a, f):
        return 1.0
    p, q = ((x - x.min()).ravel(order="F") for x in (a, f))
    if min((p > 0).sum(), (q > 0).sum()) < 2:
        return 0.0  # a distribution over one place, or none
    p, q = p / p.sum(), q / q.sum()
    r, places = np.corrcoef(p, q)[0, 1], np.arange(9)
    cdf_p, cdf_q = np.cumsum(p)[:, None], np.cumsum(q)[None]
    bound = np.minimum(cdf_p, cdf_q) if r >= 0 else np.maximum(cdf_p + cdf_q - 1, 0)
    spreads = [np.sqrt((x * places**2).sum() - (x * places).sum() ** 2) for x in (p, q)]
    phi = r * np.prod(spreads) / (bound - cdf_p * cdf_q).sum()
    corner = np.pad(bound, ((1, 0), (1, 0)))
    joint = phi * np.diff(np.diff(corner, axis=0), axis=1) + (1 - phi) * np.outer(p, q)

    def entropy(x):
        x = x[np.abs(x) > 1e-15]
        return -(x * np.log2(np.abs(x))).sum()

    information = entropy(p) + entropy(q) - entropy(joint)
    return 2 * information / (entropy(p) + entropy(q))


def by_definition(fused, mri, ct):
    """Mean over windows and sources of features (s, h, w)."""
    shape = fused.shape[0], fused.shape[1] - 2, fused.shape[2] - 2
    windows = [np.s_[s, y : y + 3, x : x + 3] for s, y, x in np.ndindex(shape)]
    return np.mean([score(source[w], fused[w]) for w in windows for source in (mri, ct)])


def pictures(*shape):
    """Noise, a gentle slope, a flat region and one bright pixel in it."""
    image = torch.rand(shape) * 2 - 1
    image[..., :6, :] = torch.linspace(-0.8, 0.8, shape[-1])
    image[..., -6:, :] = -1
    image[..., -4, 4] = 0.5
    return image


def images(*shape):
    mri, ct = pictures(*shape), pictures(*shape)
    ct[..., :, :4] = mri[..., :, :4]
    fused = torch.maximum(mri, ct)
    fused[..., 8:, 6:] *= -0.5  # anticorrelated there
    return fused, mri, ct


@pytest.mark.parametrize("shape", [(2, 1, 16, 15), (1, 1, 2, 14, 13)])
@pytest.mark.parametrize("feature", ["pixel", "gradient"])
def test_it_is_what_its_definition_says(shape, feature):
    batch = images(*shape)
    ours = {"pixel": fmi_pixel, "gradient": fmi_gradient}[feature](*batch)
    for case in range(shape[0]):
        features = [eight_bit(i)[case].double().numpy().reshape(-1, *shape[-2:]) for i in batch]
        if feature == "gradient":
            features = [np.gradient(slices, axis=-1) for slices in features]
        expected = by_definition(*features)
        assert ours[case].item() == pytest.approx(expected, abs=1e-6)  # single precision


def test_bands_of_wavelets_are_compared_by_the_same_definition():
    batch = images(1, 1, 64, 66)
    fused, *sources = (meyer_bands(eight_bit_slices(image)) for image in batch)
    scores = torch.stack([window_scores(source, fused) for source in sources])
    assert fmi_wavelet(*batch).item() == pytest.approx(scores.mean().item(), rel=1e-6)
    corner = np.s_[:, 20:40, 80:100]  # of details along w
    fused, *sources = (bands[corner] for bands in (fused, *sources))
    scores = torch.stack([window_scores(source, fused) for source in sources])
    expected = by_definition(*(bands.double().numpy() for bands in (fused, *sources)))
    assert scores.mean().item() == pytest.approx(expected, abs=1e-4)  # single precision


@pytest.mark.parametrize("feature", [lambda slices: slices, meyer_bands])
def test_two_implementations_score_every_window_alike(feature):
    fused, *sources = (feature(eight_bit_slices(image)) for image in images(2, 1, 40, 38))
    for source in sources:
        compiled = window_scores(source, fused)
        exact = scores_by_definition(source.double(), fused.double())
        torch.testing.assert_close(window_scores(source.double(), fused.double()), exact)
        torch.testing.assert_close(scores_by_definition(source, fused), compiled, rtol=0, atol=1e-3)
        # In single precision a window's score is good to 1e-3, and the mean of them to 1e-6.
        torch.testing.assert_close(compiled.double(), exact, rtol=0, atol=1e-3)
        assert compiled.double().mean().item() == pytest.approx(exact.mean().item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_feature_that_is_no_number_spoils_its_own_windows_only(dtype):
    a, b = torch.rand(2, 2, 12, 11, dtype=dtype)
    expected = window_scores(a, b)
    a[1, 5, 6] = torch.nan
    scores = window_scores(a, b)
    spoilt = torch.zeros_like(scores, dtype=torch.bool)
    spoilt[1, 3:6, 4:7] = True
    assert scores[spoilt].isnan().all()
    torch.testing.assert_close(scores[~spoilt], expected[~spoilt])


@pytest.mark.parametrize("fmi", [fmi_pixel, fmi_gradient])
def test_pictures_smaller_than_a_window_have_no_score(fmi):
    image = torch.rand(2, 1, 2, 9)
    assert fmi(image, image, image).isnan().tolist() == [True, True]


@pytest.mark.parametrize("fmi", [fmi_pixel, fmi_gradient, fmi_wavelet])
def test_identical_images_score_one(fmi):
    image = pictures(2, 1, 16, 18)
    assert fmi(image, image, image).numpy() == pytest.approx(1)


def test_noise_shares_less_with_its_sources_than_one_of_them_does():
    _, mri, ct = images(1, 1, 24, 24)
    assert fmi_pixel(torch.rand_like(mri), mri, ct) < fmi_pixel(mri, mri, ct)


def test_the_wavelet_is_orthonormal_to_its_own_shifts():
    bands = meyer_bands(torch.eye(160)[None]).double()[0]
    inner = bands[40:50] @ bands[40:150].T  # of taps that lie wholly inside
    torch.testing.assert_close(inner, torch.eye(10, 110, dtype=inner.dtype), atol=2e-3, rtol=0)


def test_the_transform_is_the_published_one_to_two_thousandths():
    pywt = pytest.importorskip("pywt", reason="the published filter comes with PyWavelets")
    lines = torch.eye(128)[:, None].expand(-1, 70, -1)  # flat along h: its low band is 2^(1/2)
    ours = meyer_bands(lines)[:, 30] / 2**0.5
    published = np.concatenate(pywt.dwt(np.eye(128), "dmey", mode="symmetric"), axis=1)
    np.testing.assert_allclose(ours, published, rtol=0, atol=2e-3)  # mirrored taps add up


def test_slices_of_one_column_have_no_derivative_along_it():
    assert fmi_gradient(*torch.rand(3, 2, 1, 4, 9, 1)).isnan().tolist() == [True, True]
