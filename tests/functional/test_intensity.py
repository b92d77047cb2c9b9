import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.functional.intensity import (
    CT_KNOTS_PIECEWISE,
    ct_from_model,
    ct_to_model,
    leaky_clamp,
    looks_like_hu,
    mri_from_model,
    mri_to_model,
    piecewise_linear,
)

HU, MODEL = (np.array(column) for column in zip(*CT_KNOTS_PIECEWISE, strict=True))


def test_the_piecewise_map_agrees_with_numpys_interpolation():
    ct_hu = torch.linspace(-1100, 3200, 1001, dtype=torch.float64)
    np.testing.assert_allclose(ct_to_model(ct_hu), np.interp(ct_hu, HU, MODEL), atol=1e-12)


def test_knots_themselves_are_met_exactly():
    at = torch.tensor([0.0, 1.0, 4.0])
    values = torch.tensor([5.0, 2.0, 8.0])
    torch.testing.assert_close(piecewise_linear(at, at, values), values)


@given(hu=st.floats(-1000, 3000))
def test_hu_come_back_from_model_space(hu):
    ct_hu = torch.tensor([hu], dtype=torch.float64)
    torch.testing.assert_close(ct_from_model(ct_to_model(ct_hu)), ct_hu, atol=1e-8, rtol=0)


def test_single_precision_loses_less_than_a_hounsfield_unit():
    ct_hu = torch.arange(-1000.0, 3001.0)
    assert (ct_from_model(ct_to_model(ct_hu)) - ct_hu).abs().max() < 0.01


def test_soft_tissue_and_bone_both_have_range():
    grey, white, spongy, cortical = ct_to_model(torch.tensor([37.0, 28.0, 400.0, 1800.0]))
    assert grey - white > 0.05  # 9 HU; the linear map of -1000..2000 HU would give 0.006
    assert cortical - spongy > 0.4  # the 40/400 window gives 0
    assert ct_to_model(torch.tensor([-1000.0, 3000.0])).tolist() == [-1.0, 1.0]


def test_every_map_is_increasing_within_its_range():
    for ct_map, low, high in (
        ("piecewise", -1000, 3000),
        ("window_40_400", -160, 240),
        ("window_8bit", 0, 255),
    ):
        values = ct_to_model(torch.linspace(low, high, 500), ct_map)
        assert (values.diff() > 0).all() and values[0] == -1 and values[-1] == 1


def test_the_stroke_window_is_400_hu_wide_about_40():
    ct_hu = torch.tensor([-500.0, -160.0, 40.0, 240.0, 1500.0])
    torch.testing.assert_close(
        ct_to_model(ct_hu, "window_40_400"), torch.tensor([-1.0, -1, 0, 1, 1])
    )


def test_eight_bits_come_back_exactly():
    eight_bit = torch.arange(256.0)
    back = ct_from_model(ct_to_model(eight_bit, "window_8bit"), "window_8bit")
    torch.testing.assert_close(back.round(), eight_bit, rtol=0, atol=0)


def test_unknown_maps_are_refused():
    # Under the type checker of the tests the refusal is its own, and no ValueError.
    with pytest.raises(Exception, match="z_score"):
        ct_to_model(torch.zeros(3), "z_score")


def test_air_tells_hounsfield_units_from_eight_bits():
    assert looks_like_hu(torch.tensor([-1000.0, 40.0]))
    assert not looks_like_hu(torch.tensor([0.0, 255.0]))


def test_mri_percentiles_are_those_of_the_mask_alone():
    mri = torch.zeros(1, 4, 20, 20)
    mask = torch.zeros(mri.shape, dtype=torch.bool)
    mask[:, 1:3] = True
    mri[mask] = torch.rand(int(mask.sum()), generator=torch.Generator().manual_seed(0)) * 900 + 100
    model, (low, high) = mri_to_model(mri, mask, percentiles=(2, 98))
    np.testing.assert_allclose((low, high), np.percentile(mri[mask], (2, 98)))
    assert model.min() == -1 and model.max() == 1
    within = (mri >= low) & (mri <= high)
    torch.testing.assert_close(
        mri_from_model(model, (low, high))[within], mri[within], rtol=1e-5, atol=1e-3
    )


def test_mri_that_cannot_be_scaled_is_refused():
    mri = torch.ones(4, 4)
    with pytest.raises(ValueError, match="contrast"):
        mri_to_model(mri, torch.ones_like(mri, dtype=torch.bool))
    with pytest.raises(ValueError, match="empty"):
        mri_to_model(mri, torch.zeros_like(mri, dtype=torch.bool))


def test_the_leaky_clamp_keeps_model_space_and_a_gradient_beyond_it():
    x = torch.tensor([-3.0, -1.0, -0.2, 0.7, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = leaky_clamp(x)
    torch.testing.assert_close(y, torch.tensor([-1.02, -1.0, -0.2, 0.7, 1.0, 1.01]).double())
    y.sum().backward()
    assert (x.grad > 0).all() and x.grad[0] == pytest.approx(0.01)
    assert torch.autograd.gradcheck(
        leaky_clamp, torch.tensor([-1.5, 0.3, 1.2]).double().requires_grad_()
    )
