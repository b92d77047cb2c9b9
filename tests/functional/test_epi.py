import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from clinfuse.functional.eight_bit import eight_bit
from clinfuse.functional.epi import epi

KERNEL = np.array([[1.0, 1, 1], [1, -8, 1], [1, 1, 1]])


def high_pass(case):
    return np.stack([correlate(s, KERNEL)[1:-1, 1:-1] for s in case.reshape(-1, *case.shape[-2:])])


@pytest.mark.parametrize("shape", [(2, 1, 12, 13), (2, 1, 3, 9, 10)])
def test_it_is_the_mean_correlation_of_laplacians(shape):
    fused, mri, ct = torch.rand(3, *shape) * 2 - 1
    for case, ours in enumerate(epi(fused, mri, ct)):
        edges = [high_pass(eight_bit(i)[case].double().numpy()).ravel() for i in (fused, mri, ct)]
        expected = np.mean([np.corrcoef(edges[0], source)[0, 1] for source in edges[1:]])
        assert ours.item() == pytest.approx(expected, rel=1e-4)  # box means in single precision


def test_an_image_keeps_its_own_edges_and_a_flat_one_none():
    image = torch.rand(1, 1, 12, 12)
    assert epi(image, image, image).item() == pytest.approx(1)
    assert epi(torch.zeros_like(image), image, image).isnan().all()


def test_slices_in_which_no_pixel_has_eight_neighbours_have_no_edges():
    for shape in ((2, 1, 2, 9), (2, 1, 4, 9, 1)):
        assert epi(*torch.rand(3, *shape)).isnan().all()
