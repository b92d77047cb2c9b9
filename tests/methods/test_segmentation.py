from functools import partial

import lightning
import pytest
import torch

from clinfuse.functional.spacing import shared_spacing
from clinfuse.functional.surface import dice
from clinfuse.methods.segmentation import IMAGES, Segmentation, VoxelDraws, blinded
from clinfuse.networks.scale_space import ScaleSpaceNetwork


@pytest.fixture
def segmentation():
    """Untrained, its weights of one seed, for images of one channel or two."""

    def build(steps=60):
        torch.manual_seed(0)
        network = ScaleSpaceNetwork((1.0, 1.0, 1.0), width=16, channels=2)
        return Segmentation(network, partial(torch.optim.AdamW, lr=1e-2), voxels=512, steps=steps)

    return build


def fit(segmentation):
    lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(segmentation)  # fmt: skip
    return segmentation.eval()


def look_at(segmentation, image, batch):
    described = segmentation.describe(IMAGES[image](batch), shared_spacing(batch.spacing_mm))
    segmentation.look_at(described, batch.lesion, batch.brain)
    return described


def test_no_image_is_made_of_the_lesion_mask_or_of_what_only_we_know(phantoms):
    batch = phantoms.batch(case=7)
    seen = blinded(batch)
    assert batch.lesion.any() and not seen.lesion.any()
    assert torch.equal(seen.roi[:, :2], batch.roi[:, :2]) and torch.equal(seen.mri, batch.mri)
    assert (seen.lesion_distance_mm == seen.lesion_distance_mm.max()).all()
    known = (seen.reference, seen.clean_mri, seen.clean_ct, seen.clean_roi, seen.findings)
    assert all(part is None for part in (*known, seen.misregistration))
    assert torch.equal(seen.truth()[0], batch.mri)  # nothing cleaner than what is given


def test_every_image_starts_from_the_same_weights_voxels_and_steps(phantoms, segmentation):
    batch = phantoms.batch(case=7)
    built = {image: segmentation() for image in IMAGES}
    for image, network in built.items():
        look_at(network, image, batch)
    first, *others = built.values()
    for other in others:
        for ours, theirs in zip(first.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(first.seen[0][1], other.seen[0][1])  # lesion or not, voxel by voxel
        for ours, theirs in zip(first.train_dataloader(), other.train_dataloader(), strict=True):
            assert torch.equal(ours, theirs)
    both, mri = (built[image].seen[0][0] for image in ("both", "MRI"))
    half = mri.shape[1] // 2
    assert torch.equal(both[:, :half], mri[:, :half])
    assert (mri[:, half:] == mri[:1, half:]).all()  # the channel that is not there says nothing


def test_a_channel_of_air_is_described_as_a_volume_of_air_would_be(segmentation):
    network, volume = segmentation(), torch.rand(2, 1, 4, 6, 5)
    described = network.describe(volume, (3.0, 2.0, 2.0))
    air = network.network.describe(torch.full_like(volume, -1.0), (3.0, 2.0, 2.0))
    torch.testing.assert_close(described[:, air.shape[1] :], air, rtol=0, atol=1e-5)


def test_it_learns_to_see_the_lesion_it_is_shown_and_says_nothing_outside_the_brain(
    phantoms, segmentation
):
    batch = phantoms.batch(0.0, case=7)
    network = segmentation()
    described = look_at(network, "both", batch)
    with torch.no_grad():
        probability = fit(network)(described, batch.brain)
    assert dice(probability > 0.5, batch.lesion) > 0.5
    assert (probability[~batch.brain] == 0).all() and probability.max() > 0.9


def test_the_same_seed_ends_with_the_same_weights_and_nothing_is_kept_of_what_was_seen(
    phantoms, segmentation
):
    batch, ends = phantoms.batch(case=7), []
    for _ in range(2):
        network = segmentation(steps=5)
        look_at(network, "MRI", batch)
        torch.randn(10)  # whatever else has been drawn
        ends.append(fit(network))
    for ours, theirs in zip(*(end.network.parameters() for end in ends), strict=True):
        assert torch.equal(ours, theirs)
    assert not network.seen


def test_an_image_of_more_channels_than_the_network_has_is_refused(segmentation):
    with pytest.raises(ValueError, match="expected an image of at most 2 channels, got 3"):
        segmentation().describe(torch.zeros(1, 3, 4, 4, 4), (1.0, 1.0, 1.0))


def test_steps_draw_from_all_voxels_each_step_its_own():
    draws = VoxelDraws(available=20, voxels=2000, steps=3, seed=1)
    drawn = list(draws)
    assert len(drawn) == len(draws) == 3 and not torch.equal(drawn[0], drawn[1])
    assert {int(number) for number in drawn[0]} == set(range(20))
    assert torch.equal(drawn[2], VoxelDraws(20, 2000, 9, seed=1)[2])
