import pytest
import torch

from clinfuse.functional.sobel import gradient_magnitude
from clinfuse.methods.rules import MaskComposite, Maximum, Weighted
from clinfuse.types import FusionBatch


@pytest.fixture
def batch():
    """Four voxels in a row, bone in the second and the last."""
    shape = (1, 1, 1, 1, 4)
    roi = torch.zeros(1, 3, 1, 1, 4, dtype=torch.bool)
    roi[0, 1, 0, 0, [1, 3]] = True
    roi[0, 0, 0, 0, 0] = True
    return FusionBatch(
        mri=torch.tensor([0.5, -1.0, 0.2, 0.8]).reshape(shape),
        ct=torch.tensor([-0.5, 1.0, 0.4, 0.7]).reshape(shape),
        roi=roi,
        spacing_mm=torch.ones(1, 3),
        case_id=["four"],
    )


@pytest.mark.parametrize(
    "method, expected",
    [
        (Weighted(0.5), [0.0, 0.0, 0.3, 0.75]),
        (Weighted(0.7), [0.2, -0.4, 0.26, 0.77]),
        (Weighted(1.0), [0.5, -1.0, 0.2, 0.8]),
        (Weighted(0.0), [-0.5, 1.0, 0.4, 0.7]),
        (Maximum(), [0.5, 1.0, 0.4, 0.8]),
        (MaskComposite(), [0.5, 1.0, 0.2, 0.7]),
    ],
    ids=["average", "weighted", "mri", "ct", "maximum", "mask_composite"],
)
def test_rules_give_what_one_works_out_by_hand(method, expected, batch):
    torch.testing.assert_close(method.fuse(batch).flatten(), torch.tensor(expected))


@pytest.mark.parametrize("option, mri_weight", [("average", 0.5), ("weighted", 0.7)])
def test_the_configured_weights_are_those_of_the_baselines_table(
    option, mri_weight, phantoms, batch
):
    torch.testing.assert_close(
        phantoms.method(option).fuse(batch), mri_weight * batch.mri + (1 - mri_weight) * batch.ct
    )


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_weights_outside_zero_to_one_are_refused(weight):
    with pytest.raises(ValueError, match=f"mri_weight in .0, 1., got {weight}"):
        Weighted(weight)


def test_on_perfect_registration_mask_composite_has_no_error_in_brain_and_bone(phantoms):
    still, moved = phantoms.batch(0.0), phantoms.batch(4.0)
    composite = MaskComposite()
    still.mri, still.ct = still.clean_mri, still.clean_ct
    moved.mri = moved.clean_mri
    brain, bone = still.clean_roi[:, 0:1], still.clean_roi[:, 1:2]
    assert torch.equal(composite.fuse(still)[brain], still.clean_mri[brain])
    assert torch.equal(composite.fuse(still)[bone], still.clean_ct[bone])
    assert (composite.fuse(moved)[bone] - moved.clean_ct[bone]).square().mean() > 0.05


@pytest.mark.parametrize("shape", [(33, 27), (7, 17, 21)])
@pytest.mark.parametrize(
    "option",
    [
        "average", "weighted", "maximum", "mask_composite", "laplacian_pyramid",
        "laplacian_energy", "wavelet",
    ],
)  # fmt: skip
def test_every_rule_fuses_slices_and_volumes_of_odd_sizes_within_model_space(
    option, shape, phantoms
):
    method = phantoms.method(option)
    mri, ct = 2 * torch.rand(2, 2, 1, *shape) - 1
    roi = torch.rand(2, 3, *shape) > 0.5
    fused = method.fuse(FusionBatch(mri, ct, roi, torch.ones(2, len(shape)), ["a", "b"]))
    assert not method.is_trainable and fused.shape == mri.shape
    assert fused.abs().max() <= 1 and fused.std() > 0.1


def test_multi_scale_rules_keep_more_of_both_gradients_than_the_average(phantoms):
    batch = phantoms.batch(0.0)
    mri, ct, _ = batch.truth()
    batch.mri, batch.ct = mri, ct
    steeper = gradient_magnitude(mri).maximum(gradient_magnitude(ct))
    options = ("average", "laplacian_pyramid", "laplacian_energy", "wavelet")
    lost = {
        option: (gradient_magnitude(phantoms.method(option).fuse(batch)) - steeper).abs().mean()
        for option in options
    }
    assert all(lost[option] < 0.8 * lost["average"] for option in options[1:]), lost
