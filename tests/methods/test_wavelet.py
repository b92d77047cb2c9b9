import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.methods.selection import larger_magnitude, mean
from clinfuse.methods.wavelet import Wavelet
from clinfuse.types import FusionBatch


def pair(*shape):
    mri, ct = 2 * torch.rand(2, 2, 1, *shape) - 1
    roi = torch.zeros(2, 3, *shape, dtype=torch.bool)
    return FusionBatch(mri, ct, roi, torch.ones(2, len(shape)), ["a", "b"])


def by_pywt(mri, ct, wavelet, levels):
    """The same fusion of two arrays by PyWavelets."""
    mri, ct = (pywt.wavedecn(x, wavelet, "symmetric", levels) for x in (mri, ct))
    details = [
        {name: np.where(abs(m[name]) >= abs(c[name]), m[name], c[name]) for name in m}
        for m, c in zip(mri[1:], ct[1:], strict=True)
    ]
    return pywt.waverecn([(mri[0] + ct[0]) / 2, *details], wavelet, "symmetric")


@pytest.mark.parametrize("wavelet, levels", [("haar", 4), ("db2", 3), ("bior4.4", 2)])
@pytest.mark.parametrize("shape", [(37, 50), (40, 41), (16, 19, 24)])
def test_fusion_agrees_with_pywavelets(wavelet, levels, shape):
    batch = pair(*shape)
    fused = Wavelet(wavelet, levels, larger_magnitude, mean).fuse(batch)
    assert fused.shape == batch.mri.shape
    for mri, ct, ours in zip(batch.mri[:, 0], batch.ct[:, 0], fused[:, 0], strict=True):
        theirs = by_pywt(mri.double().numpy(), ct.double().numpy(), wavelet, levels)
        cropped = theirs[tuple(slice(size) for size in shape)].clip(-1, 1)
        np.testing.assert_allclose(ours, cropped, atol=2e-5)  # ours is in single precision


@given(
    shape=st.lists(st.integers(1, 19), min_size=2, max_size=3),
    wavelet=st.sampled_from(["haar", "db3", "bior2.2"]),
    levels=st.integers(1, 4),
)
@settings(max_examples=25)
def test_equal_sources_of_any_size_are_what_they_fuse_to(shape, wavelet, levels):
    batch = pair(*shape)
    batch.ct = batch.mri
    fused = Wavelet(wavelet, levels, larger_magnitude, mean).fuse(batch)
    torch.testing.assert_close(fused, batch.mri, atol=1e-4, rtol=0)


def test_mixed_precision_does_not_blur_the_result():
    batch, method = pair(16, 24, 24), Wavelet("haar", 2, larger_magnitude, mean)
    with torch.autocast("cpu", torch.bfloat16):
        inside = method.fuse(batch)
    assert inside.dtype == torch.float32 and torch.equal(inside, method.fuse(batch))


@pytest.mark.parametrize("wavelet", ["morl", "har", ""])
def test_what_is_no_discrete_wavelet_is_refused(wavelet):
    with pytest.raises(
        ValueError, match=f"expected a discrete wavelet such as .*, got '{wavelet}'"
    ):
        Wavelet(wavelet, 1, larger_magnitude, mean)


def test_no_level_is_refused():
    with pytest.raises(ValueError, match="at least one level of the wavelet, got 0"):
        Wavelet("haar", 0, larger_magnitude, mean)
