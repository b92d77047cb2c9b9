import numpy as np
import pytest
import torch
from scipy import ndimage

from clinfuse.functional.sobel import gradient_magnitude, sobel


@pytest.mark.parametrize("shape", [(9, 11), (5, 7, 9)])
def test_derivatives_are_scipys_sobel_over_its_norm(shape):
    image = torch.rand(2, 1, *shape, dtype=torch.float64)
    norm = 2 * 4 ** (len(shape) - 1)
    for case, ours in zip(image, sobel(image), strict=True):
        theirs = [
            ndimage.sobel(case[0].numpy(), axis, mode="nearest") for axis in range(len(shape))
        ]
        np.testing.assert_allclose(ours.numpy(), np.stack(theirs) / norm, atol=1e-12)


def test_a_ramp_has_its_slope_inside_and_half_of_it_at_its_ends():
    ramp = torch.arange(6.0)[:, None].expand(6, 5)[None, None] * 0.3
    found = gradient_magnitude(ramp)[0, 0]
    torch.testing.assert_close(found[1:-1], torch.full((4, 5), 0.3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], torch.full((5,), 0.15), atol=1e-5, rtol=0)


def test_a_flat_image_has_no_gradient_and_one_that_can_be_walked_down():
    flat = torch.zeros(1, 1, 4, 4, requires_grad=True)
    magnitude = gradient_magnitude(flat)
    assert magnitude.abs().max() < 1e-9
    magnitude.sum().backward()
    assert flat.grad.isfinite().all()
