import numpy as np
import pytest
import torch
from skimage.measure import shannon_entropy
from sklearn.metrics import mutual_info_score

from clinfuse.functional.eight_bit import eight_bit
from clinfuse.functional.entropy import entropy, mutual_information


def images(count, *shape):
    """Of about forty grey levels, so that joint histograms are neither empty nor full."""
    return (torch.randn(count, *shape) * 0.08).clamp(-1, 1)


def test_half_the_pixels_black_and_a_quarter_of_either_other_level_are_one_and_a_half_bits():
    image = torch.full((1, 1, 8, 8), -1.0)
    image[..., :4, :4] = 0.5
    image[..., 4:, :4] = 1.0
    assert entropy(image).item() == pytest.approx(1.5)


def test_a_flat_image_has_no_entropy_and_tells_nothing_of_its_sources():
    flat, source = torch.zeros(1, 1, 8, 8), torch.rand(1, 1, 8, 8)
    assert entropy(flat).item() == 0
    assert mutual_information(flat, source, source).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 24, 20), (2, 1, 5, 12, 14)])
def test_the_entropy_agrees_with_scikit_image(shape):
    (image,) = images(1, *shape)
    expected = [shannon_entropy(case.numpy(), base=2) for case in eight_bit(image)]
    np.testing.assert_allclose(entropy(image), expected, rtol=1e-5)  # single precision


@pytest.mark.parametrize("shape", [(3, 1, 24, 20), (2, 1, 5, 12, 14)])
def test_the_mutual_information_agrees_with_scikit_learn(shape):
    fused, mri, ct = images(3, *shape)
    expected = [
        sum(mutual_info_score(source.flatten().tolist(), f.flatten().tolist()) for source in (m, c))
        for f, m, c in zip(*(eight_bit(image).int() for image in (fused, mri, ct)), strict=True)
    ]
    ours = mutual_information(fused, mri, ct)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)  # single precision


def test_an_image_fused_with_itself_knows_its_own_entropy_twice():
    (image,) = images(1, 2, 1, 16, 16)
    nats = entropy(image) * np.log(2)
    torch.testing.assert_close(mutual_information(image, image, image), (2 * nats).float())


def test_a_case_with_a_voxel_that_is_no_number_has_none_and_the_others_theirs():
    image, other = images(2, 2, 1, 6, 7)
    spoilt = image.clone()
    spoilt[0, 0, 2, 3] = torch.nan
    assert entropy(spoilt).isnan().tolist() == [True, False]
    assert entropy(spoilt)[1] == entropy(image)[1]
    for three in ((spoilt, other, other), (other, spoilt, other), (other, other, spoilt)):
        assert mutual_information(*three).isnan().tolist() == [True, False]
