import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from clinfuse.functional.eight_bit import eight_bit
from clinfuse.functional.vif import SMALLEST, vif, visual_fidelity


@pytest.fixture
def piq_vif(monkeypatch):
    """VIF as piq computes it, loaded without the rest of piq, whose __init__ wants torchvision."""
    spec = importlib.util.find_spec("piq")
    if spec is None:
        pytest.skip("piq is not installed: pip install --no-deps piq")
    package = ModuleType("piq")
    package.__path__ = list(spec.submodule_search_locations or ())
    monkeypatch.setitem(sys.modules, "piq", package)
    return importlib.import_module("piq.vif").vif_p


def pictures(*shape):
    """Smooth structures and a flat bright band, on black."""
    rough = torch.randn(shape).flatten(0, -3)[:, None]
    image = torch.nn.functional.avg_pool2d(rough, 5, 1, 2).view(shape) * 2
    image[..., :12] = -1
    image[..., -10:] = 0.9
    return image.clamp(-1, 1)


def test_it_agrees_with_piq_summed_over_both_sources(piq_vif):
    mri, ct = pictures(3, 1, 64, 61), pictures(3, 1, 64, 61)
    fused = torch.maximum(mri, ct)
    levels = [eight_bit(image).double() for image in (fused, mri, ct)]
    expected = sum(piq_vif(levels[0], s, data_range=255.0, reduction="none") for s in levels[1:])
    # Single precision: variances below 5e-3 squared grey levels count for nothing.
    torch.testing.assert_close(vif(fused, mri, ct).double(), expected, rtol=1e-3, atol=0)


def test_identical_images_keep_all_of_both():
    image = pictures(2, 1, 48, 48)
    assert vif(image, image, image).numpy() == pytest.approx(2, abs=1e-3)


def test_an_inverted_image_keeps_less_than_a_noisy_one():
    image = pictures(1, 1, 48, 48)
    noisy = (image + 0.1 * torch.randn_like(image)).clamp(-1, 1)
    assert vif(-image, image, image) < 0.1 < vif(noisy, image, image) < 1.9


def test_a_volume_pools_what_its_slices_tell(piq_vif):
    mri, ct = pictures(1, 1, 3, 48, 48), pictures(1, 1, 3, 48, 48)
    ct[:, :, 1] = -1
    fused = (mri + ct) / 2
    singly = torch.stack([vif(fused[:, :, k], mri[:, :, k], ct[:, :, k]) for k in (0, 2)])
    together = vif(fused[:, :, ::2], mri[:, :, ::2], ct[:, :, ::2])
    assert singly.min() <= together <= singly.max()
    assert vif(fused, mri, ct).isfinite()  # though one slice of the CT is empty


def test_small_slices_and_flat_sources_are_undefined():
    small = torch.rand(2, 1, SMALLEST - 1, 60)
    assert vif(small, small, small).isnan().all()
    enough = torch.rand(1, 1, SMALLEST, SMALLEST)
    assert vif(enough, enough, enough).isfinite().all()
    assert vif(enough, enough, torch.zeros_like(enough)).isnan().all()


def test_the_differentiable_form_is_the_metric_without_rounding_and_has_its_gradient():
    mri, ct = pictures(1, 1, 44, 44), pictures(1, 1, 44, 44)
    fused = (eight_bit((mri + ct) / 2) / 127.5 - 1).double().requires_grad_()
    mri, ct = (eight_bit(image).double() / 127.5 - 1 for image in (mri, ct))
    value = visual_fidelity(fused, mri, ct)
    torch.testing.assert_close(value.float(), vif(fused, mri, ct), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), fused)
    direction = torch.randn_like(fused)
    step = 1e-6
    ahead, behind = (visual_fidelity(fused + s * direction, mri, ct) for s in (step, -step))
    expected = (ahead - behind) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected.squeeze(), rtol=1e-3, atol=0)
