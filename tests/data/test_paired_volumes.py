import json
import logging
from dataclasses import fields

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clinfuse.data.augmentation import Augmentation
from clinfuse.data.jitter import RegistrationJitter, fixed_misregistration
from clinfuse.data.paired_volumes import (
    DrawnBatch,
    DrawSampler,
    PairedVolumes,
    collate_batches,
    study_item,
)
from clinfuse.data.splits import read_splits
from clinfuse.data.studies import load_study
from clinfuse.functional.intensity import ct_to_model
from clinfuse.functional.warp import rigid_displacement, warp
from clinfuse.types import FusionBatch

SPACING_MM = (4.0, 3.0, 2.0)
JITTER = RegistrationJitter(max_mm=4, max_deg=5, probability=1)
STILL = RegistrationJitter(probability=0)
SHAPE_ONLY = Augmentation(flip=0.5, affine=1, max_log_gamma=0, max_noise=0)


@pytest.fixture
def cohort(make_study):
    for i in range(8):
        folder = make_study(f"case_{i:02d}")
    return folder.parent


def blob(centre_mm=(0.0, 0.0, 0.0), width_mm=14.0, shape=(14, 20, 26)):
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, SPACING_MM, strict=True)]
    squares = (
        (x - c) ** 2 for x, c in zip(np.meshgrid(*axes, indexing="ij"), centre_mm, strict=True)
    )
    return np.exp(-sum(squares) / (2 * width_mm**2))


@pytest.fixture
def smooth_cohort(make_study):
    """CT so smooth that interpolating it twice changes it little: 8-bit, a blob off the centre."""
    for i in range(3):
        folder = make_study(f"case_{i:02d}", ct=200 * blob((4, -5, 6)))
    return folder.parent


def same(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(one, f.name), getattr(other, f.name)) for f in fields(FusionBatch))
    )


def draws(data):
    return list(data.train_dataloader())


def test_a_batch_has_everything_that_losses_and_metrics_ask_for(cohort):
    data = PairedVolumes(cohort, batch_size=2, jitter=JITTER, augmentation=Augmentation())
    batch = draws(data)[0]
    assert len(batch) == 2 and batch.mri.shape == (2, 1, 14, 20, 26)
    assert all(getattr(batch, field.name) is not None for field in fields(FusionBatch))
    for name in ("mri", "ct", "clean_mri", "clean_ct", "reference"):
        volume = getattr(batch, name)
        assert volume.isfinite().all() and volume.min() >= -1 and volume.max() <= 1
    assert batch.spacing_mm.tolist() == [list(SPACING_MM)] * 2


def test_draws_depend_on_the_seed_and_on_nothing_else(cohort):
    options = {"jitter": JITTER, "augmentation": Augmentation(), "patch_shape": (8, 12, 16)}
    here = draws(PairedVolumes(cohort, seed=1, **options))
    torch.manual_seed(99)
    again = draws(PairedVolumes(cohort, seed=1, **options))
    elsewhere = draws(PairedVolumes(cohort, seed=1, num_workers=2, **options))
    assert all(map(same, here, again)) and all(map(same, here, elsewhere))
    assert not any(map(same, here, draws(PairedVolumes(cohort, seed=2, **options))))


def test_a_rules_weights_can_be_trained_on_validation_patients_alone(cohort):
    splits = {"train": ["case_00"], "val": ["case_01", "case_02"], "test": ["case_03"]}
    data = PairedVolumes(cohort, splits=splits, train_on="val", draws_per_epoch=4)
    assert {batch.case_id[0] for batch in draws(data)} == set(splits["val"])
    with pytest.raises(ValueError, match="train_on of train or val, got 'test'"):
        PairedVolumes(cohort, train_on="test")


def test_every_case_is_drawn_equally_often_across_epochs():
    sampler = DrawSampler(cases=7, draws_per_epoch=5, seed=3)
    cases = []
    for epoch in range(7):
        sampler.set_epoch(epoch)
        cases += [draw.case for draw in sampler]
    assert [cases[i : i + 7] for i in range(0, 35, 7)] != [cases[:7]] * 5
    assert all(sorted(cases[i : i + 7]) == list(range(7)) for i in range(0, 35, 7))


def test_no_two_draws_share_their_randomness():
    sampler = DrawSampler(cases=3, draws_per_epoch=50, seed=0)
    seeds = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        seeds += [draw.seed for draw in sampler]
    assert len(set(seeds)) == 1000


def draws_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_goes_on_after_the_batches_that_were_done_and_the_next_is_whole():
    whole = DrawSampler(cases=3, draws_per_epoch=10, seed=0, batch_size=4)
    resumed = DrawSampler(cases=3, draws_per_epoch=10, seed=0, batch_size=4)
    resumed.begin_at(epoch=2, batches=2)
    assert len(resumed) == 10 and draws_of(resumed, 2) == draws_of(whole, 2)[8:]
    assert draws_of(resumed, 3) == draws_of(whole, 3)


@given(ranks=st.integers(1, 4), size=st.integers(1, 3), parts=st.integers(1, 9))
def test_ranks_together_see_the_batches_of_one_process(ranks, size, parts):
    draws = ranks * parts
    one = draws_of(DrawSampler(5, draws, seed=1, batch_size=ranks * size), 3)
    shares = [
        draws_of(DrawSampler(5, draws, 1, batch_size=size, rank=rank, ranks=ranks), 3)
        for rank in range(ranks)
    ]
    together = []
    for first in range(0, parts, size):
        together += [draw for share in shares for draw in share[first : first + size]]
    assert together == one and {len(share) for share in shares} == {parts}
    late = DrawSampler(5, draws, 1, batch_size=size, rank=ranks - 1, ranks=ranks)
    late.begin_at(epoch=3, batches=1)
    assert draws_of(late, 3) == shares[-1][size:] and len(late) == parts


def test_an_epoch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="3 processes can share out evenly, got 10 in batches of"):
        DrawSampler(cases=3, draws_per_epoch=10, seed=0, batch_size=2, ranks=3)


class Listener(lightning.LightningModule):
    """A method that only remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, _index):
        self.seen.append((batch.case_id[0], float(batch.ct.mean()), float(batch.mri.mean())))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_training_repeats_the_draws_of_an_uninterrupted_one(cohort, tmp_path):
    def trained(epochs, checkpoint=None):
        data = PairedVolumes(cohort, jitter=JITTER, augmentation=Augmentation())
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        listener = Listener()
        trainer.fit(listener, datamodule=data, ckpt_path=checkpoint)
        return trainer, listener.seen

    _, whole = trained(2)
    half, first = trained(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, second = trained(2, tmp_path / "half.ckpt")
    assert first + second == whole
    assert first[0] != second[0]


def test_jitter_moves_ct_and_bone_and_nothing_else(cohort):
    still = draws(PairedVolumes(cohort, jitter=STILL))
    moved = draws(PairedVolumes(cohort, jitter=JITTER))
    for a, b in zip(still, moved, strict=True):
        assert torch.equal(a.ct, a.clean_ct) and torch.equal(a.roi, a.clean_roi)
        assert torch.equal(a.misregistration[0], torch.eye(4))
        assert not torch.equal(b.ct, a.ct) and not torch.equal(b.bone, a.bone)
        for name in ("mri", "brain", "lesion", "reference", "clean_mri", "clean_ct", "clean_roi"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert torch.equal(a.lesion_distance_mm, b.lesion_distance_mm)


@pytest.mark.parametrize(
    "made_by, stays",
    [
        ("nobody", False),  # segmented in the CT as it is read
        ({"tool": "clinfuse.roi.masks"}, False),
        ({"tool": "TotalSegmentator", "task": "total"}, False),
        ({"tool": "TotalSegmentator", "task": "total_mr"}, True),
        ({"tool": "file"}, True),
    ],
)
def test_a_brain_that_was_found_in_the_ct_moves_with_it_and_one_of_the_mri_stays(
    make_study, made_by, stays
):
    """Left behind, it would tell a method where the CT belongs."""
    folder = make_study("case", without=("brain_mask",) if made_by == "nobody" else ())
    if made_by != "nobody":
        (folder / "study.json").write_text(json.dumps({"masks": {"brain_mask": made_by}}))
    study = load_study(folder)
    item = study_item(study, fixed_misregistration("case", 12.0, 0.0))
    assert torch.equal(item.brain, item.clean_roi[:, :1]) == stays
    assert torch.equal(item.clean_roi[0], study.roi)


@pytest.mark.parametrize(
    ("patch_shape", "border"),  # voxels that may have come from outside the study or the patch
    [(None, (2, 3, 3)), ((8, 14, 14), (2, 4, 4)), ((18, 12, 30), (4, 4, 6))],
    ids=["whole", "patch", "padded"],
)
@pytest.mark.parametrize("augmentation", [None, SHAPE_ONLY], ids=["plain", "augmented"])
def test_the_recorded_misregistration_realigns_what_the_network_sees(
    smooth_cohort, augmentation, patch_shape, border
):
    data = PairedVolumes(
        smooth_cohort, jitter=JITTER, augmentation=augmentation, patch_shape=patch_shape,
        draws_per_epoch=12, splits={"train": ["case_00", "case_01"]},
    )  # fmt: skip
    off, restored = [], []
    for batch in draws(data):
        shape = batch.ct.shape[2:]
        displacement = rigid_displacement(batch.misregistration, shape, batch.spacing_mm)
        realigned = warp(batch.ct, displacement, batch.spacing_mm)
        inside = (..., *(slice(n, -n) for n in border))
        off.append((batch.ct - batch.clean_ct)[inside].square().mean().sqrt())
        restored.append((realigned - batch.clean_ct)[inside].square().mean().sqrt())
    assert torch.stack(restored).mean() < 0.15 * torch.stack(off).mean()


def test_what_the_network_sees_is_moved_by_the_amplitude_that_was_asked_for(make_study):
    def centre_mm(volume):
        weight = (volume[0, 0] + 1).double()
        axes = [
            (torch.arange(n) - (n - 1) / 2) * s
            for n, s in zip(weight.shape, SPACING_MM, strict=True)
        ]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).double()
        return (grid * weight).sum((1, 2, 3)) / weight.sum()

    folder = make_study(ct=250 * blob((2, -3, 1), width_mm=6))
    options = {"splits": {"test": [folder.name]}, "misregistration_deg_per_mm": 0}
    data = PairedVolumes(folder.parent, **options)
    for amplitude_mm in (1.0, 2.0):
        for batch in data.test_batches(amplitude_mm):
            shift = centre_mm(batch.ct) - centre_mm(batch.clean_ct)
            assert float(shift.norm()) == pytest.approx(amplitude_mm, rel=0.02)
            asked = batch.misregistration[0, :3, 3].double()
            assert torch.cosine_similarity(shift, asked, dim=0) > 0.999


def test_evaluation_moves_every_seed_alike_and_zero_moves_nothing(cohort):
    one, other = (PairedVolumes(cohort, seed=seed) for seed in (1, 2))
    for a, b in zip(one.test_batches(3.0), other.test_batches(3.0), strict=True):
        assert same(a, b) and not torch.equal(a.ct, a.clean_ct)
    for batch in one.val_batches(0):
        assert torch.equal(batch.ct, batch.clean_ct) and torch.equal(batch.roi, batch.clean_roi)


def test_the_loaders_of_a_test_follow_the_amplitudes(cohort):
    data = PairedVolumes(cohort, misregistration_mm=(0, 2, 4), misregistration_deg_per_mm=0.5)
    loaders = data.test_dataloader()
    shifts = [float(batch.misregistration[0, :3, 3].norm()) for ld in loaders for batch in ld]
    assert shifts == pytest.approx([0, 2, 4])  # one test case of eight
    for batch in data.val_dataloader():
        assert float(batch.misregistration[0, :3, 3].norm()) == pytest.approx(2)
        cosine = (batch.misregistration[0, :3, :3].trace() - 1) / 2
        assert float(torch.rad2deg(cosine.acos())) == pytest.approx(1, abs=0.05)  # float32 acos


@pytest.fixture
def calcified(make_study):
    """Studies with a calcification in the left half of the brain, on CT alone."""
    for case in ("case_00", "case_01", "case_02"):
        ct = np.full((14, 20, 26), 30.0)
        ct[5:9, 8:13, 7:13] = 300.0
        folder = make_study(case, ct=np.where(blob(width_mm=20) > 0.2, ct, -1000.0))
    return folder.parent


def test_findings_are_where_the_clean_ct_shows_them_and_stay_when_the_ct_moves(calcified):
    options = {"splits": {"train": ["case_00", "case_01"], "test": ["case_02"]}}
    data = PairedVolumes(calcified, batch_size=2, jitter=JITTER, **options)
    (batch,) = draws(data)
    study = data.study(batch.case_id[0])
    assert batch.findings.dtype == torch.bool and batch.findings.shape == (2, 1, 14, 20, 26)
    assert study.findings.any() and torch.equal(batch.findings[0], study.findings)
    calcium = ct_to_model(torch.tensor(290.0))
    assert (batch.clean_ct[batch.findings] > calcium).all()
    assert (batch.ct[batch.findings] > calcium).float().mean() < 0.9
    for amplitude_mm in (0.0, 3.0):
        (tested,) = data.test_batches(amplitude_mm)
        assert torch.equal(tested.findings[0], study.findings)


def test_findings_follow_augmentation_patches_and_padding(calcified):
    options = {"splits": {"train": ["case_00", "case_01"]}, "patch_shape": (20, 16, 20)}
    (plain,) = draws(PairedVolumes(calcified, **options, batch_size=2, draws_per_epoch=2))
    assert plain.findings.shape == plain.ct.shape
    varied = draws(PairedVolumes(calcified, **options, augmentation=SHAPE_ONLY, draws_per_epoch=8))
    edge, places = ct_to_model(torch.tensor([30.0, 300.0])).mean(), set()
    for batch in [plain, *varied]:
        dense = (batch.clean_ct > edge) & batch.clean_roi[:, :1]
        assert (dense & batch.findings).sum() > 0.7 * dense.sum() > 0  # 98 of 120 lie off the rim
        assert (dense & batch.findings).sum() > 0.9 * batch.findings.sum()
        assert not batch.findings[:, :, :3].any() and not batch.findings[:, :, -3:].any()
        places.add(tuple(batch.findings.nonzero()[0].tolist()))
    assert len(places) > 4


def test_a_study_without_findings_says_so(cohort):
    assert not any(batch.findings.any() for batch in draws(PairedVolumes(cohort)))


def test_augmentation_is_applied_to_all_alike(cohort):
    plain = draws(PairedVolumes(cohort))
    varied = draws(PairedVolumes(cohort, augmentation=SHAPE_ONLY))
    for a, b in zip(plain, varied, strict=True):
        assert a.case_id == b.case_id and not torch.equal(a.mri, b.mri)
        assert torch.equal(b.mri, b.clean_mri) and torch.equal(b.ct, b.clean_ct)
        assert torch.equal(b.roi, b.clean_roi)
        bone_hu = ct_to_model(torch.tensor(500.0))
        skull = b.ct > bone_hu  # goes where the mask goes, but for partial volume
        assert (skull & b.bone).sum() > 0.97 * skull.sum()
        assert (skull & a.bone).sum() < 0.95 * skull.sum()
        assert ((b.lesion_distance_mm <= 0) == b.lesion).float().mean() > 0.99
        assert not torch.equal(a.lesion, b.lesion)


def test_flips_alone_exchange_left_and_right_exactly(cohort):
    plain = draws(PairedVolumes(cohort))
    flipped = draws(
        PairedVolumes(cohort, augmentation=Augmentation(1, 0, max_log_gamma=0, max_noise=0))
    )
    for a, b in zip(plain, flipped, strict=True):
        for name in ("mri", "ct", "roi", "clean_mri", "clean_ct", "lesion_distance_mm"):
            assert torch.equal(getattr(a, name).flip(-1), getattr(b, name)), name
        torch.testing.assert_close(a.reference.flip(-1), b.reference)


def test_contrast_changes_the_mri_and_its_truth_and_noise_the_inputs_only(cohort):
    plain = draws(PairedVolumes(cohort))
    gamma = draws(PairedVolumes(cohort, augmentation=Augmentation(0, 0, max_noise=0)))
    noise = draws(PairedVolumes(cohort, augmentation=Augmentation(0, 0, max_log_gamma=0)))
    for a, b, c in zip(plain, gamma, noise, strict=True):
        assert torch.equal(b.mri, b.clean_mri) and not torch.equal(a.mri, b.mri)
        assert torch.equal(a.ct, b.ct)
        bone = b.clean_roi[:, 1:2]
        torch.testing.assert_close(b.reference[bone], b.clean_ct[bone])
        far = b.lesion_distance_mm <= 0  # in the lesion, far from bone
        torch.testing.assert_close(b.reference[far], b.clean_mri[far], atol=1e-3, rtol=0)
        assert not torch.equal(a.mri, c.mri) and not torch.equal(a.ct, c.ct)
        for name in ("clean_mri", "clean_ct", "reference", "roi"):
            assert torch.equal(getattr(a, name), getattr(c, name)), name


def test_a_shipped_reference_moves_along_and_keeps_its_contrast(make_study):
    folder = make_study(reference=0.5 * blob())
    options = {"splits": {"train": ["case_01"]}, "augmentation": Augmentation(1, 0, max_noise=0)}
    (batch,) = draws(PairedVolumes(folder.parent, **options))
    expected = torch.from_numpy(0.5 * blob()).float().flip(-1)
    torch.testing.assert_close(batch.reference[0, 0], expected)
    (plain,) = draws(PairedVolumes(folder.parent, splits=options["splits"]))
    assert torch.equal(batch.clean_mri, plain.clean_mri.flip(-1))


def test_drawing_never_changes_the_study_in_memory(cohort):
    data = PairedVolumes(cohort, jitter=STILL, augmentation=None)
    study = data.studies("train")[0]
    before = study.mri.clone()
    for batch in draws(data):
        batch.mri.zero_(), batch.ct.zero_(), batch.reference.zero_()
    assert torch.equal(study.mri, before) and not (study.reference == 0).all()


def test_patches_hold_tissue_of_every_study_and_vary(cohort):
    data = PairedVolumes(cohort, batch_size=2, patch_shape=(5, 8, 8), draws_per_epoch=20)
    batches = draws(data)
    assert all(batch.mri.shape == (2, 1, 5, 8, 8) for batch in batches)
    assert all(batch.clean_roi[:, :2].flatten(1).any(1).all() for batch in batches)
    assert len({float(batch.mri.sum()) for batch in batches}) == 10


def test_a_study_smaller_than_the_patch_is_padded_with_air(cohort):
    data = PairedVolumes(cohort, patch_shape=(19, 24, 28))
    batch = draws(data)[0]
    whole = study_item(data.study(batch.case_id[0]), torch.eye(4, dtype=torch.float64))
    middle = (..., slice(2, 16), slice(2, 22), slice(1, 27))
    assert torch.equal(batch.mri[middle], whole.mri) and torch.equal(batch.roi[middle], whole.roi)
    assert batch.ct.sum() == pytest.approx(float(whole.ct.sum()) - (19 * 24 * 28 - 7280), rel=1e-4)
    assert batch.roi.sum() == whole.roi.sum()
    assert (batch.lesion_distance_mm[..., 0, 0, 0] == whole.lesion_distance_mm[..., 0, 0, 0]).all()


@pytest.mark.parametrize("patch_shape", [None, (8, 12, 16), (18, 12, 30)])
def test_whatever_moves_them_draws_are_the_same_to_rounding(cohort, patch_shape):
    options = {"jitter": JITTER, "augmentation": Augmentation(affine=1), "batch_size": 2}
    theirs, ours, drawn = (
        draws(PairedVolumes(cohort, patch_shape=patch_shape, moved_by=by, **options))
        for by in ("torchio", "spline", "device")
    )
    assert all(isinstance(batch, DrawnBatch) for batch in drawn)
    for ours_, drawn_ in zip(ours, drawn, strict=True):
        assert same(ours_, drawn_.to("cpu").made())
    for a, b in zip(ours, theirs, strict=True):
        for field in fields(FusionBatch):
            one, other = getattr(a, field.name), getattr(b, field.name)
            if not isinstance(one, torch.Tensor):
                assert one == other
            elif one.dtype == torch.bool:
                assert (one != other).float().mean() < 1e-4, field.name
            else:
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-6)


def test_patches_are_cut_out_of_what_whole_studies_would_give(cohort):
    """The last axis alone is cut, and the other two padded."""
    splits = {"train": ["case_00"]}
    options = {"jitter": JITTER, "splits": splits, "draws_per_epoch": 4}
    patches = draws(PairedVolumes(cohort, patch_shape=(16, 20, 12), **options))
    for patch, whole in zip(patches, draws(PairedVolumes(cohort, **options)), strict=True):
        (start,) = (
            start
            for start in range(15)
            if torch.equal(patch.mri[..., 1:15, :, :], whole.mri[..., start : start + 12])
        )
        ct = whole.ct[..., start : start + 12]
        torch.testing.assert_close(patch.ct[..., 1:15, :, :], ct, atol=1e-5, rtol=0)


def test_a_device_that_moves_its_draws_trains_on_the_same_and_repeats_them(cohort):
    def seen(**options):
        data = PairedVolumes(cohort, jitter=JITTER, augmentation=Augmentation(), **options)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        listener = Listener()
        trainer.fit(listener, datamodule=data)
        return listener.seen

    device = seen(moved_by="device", patch_shape=(8, 12, 16))
    assert device == seen(moved_by="device", patch_shape=(8, 12, 16), num_workers=1)
    assert device == seen(moved_by="spline", patch_shape=(8, 12, 16))


def test_a_mover_that_there_is_not_is_refused(cohort):
    with pytest.raises(ValueError, match=r"expected moved_by of .*'device'.*, got 'gpu'"):
        PairedVolumes(cohort, moved_by="gpu")


def test_draws_and_evaluation_of_kept_studies_are_those_of_studies_that_are_read(cohort, tmp_path):
    options = {"jitter": JITTER, "augmentation": Augmentation(), "patch_shape": (8, 12, 16)}
    read = PairedVolumes(cohort, **options)
    for _ in range(2):  # made, and found
        kept = PairedVolumes(cohort, cache_dir=tmp_path / "cache", **options)
        assert all(map(same, draws(kept), draws(read)))
        assert all(map(same, kept.test_batches(2.0), read.test_batches(2.0)))
        assert kept.describe() == read.describe()


def test_cases_of_two_sizes_do_not_make_a_batch(cohort):
    batches = [
        draws(PairedVolumes(cohort, patch_shape=shape))[0] for shape in ((8, 8, 8), (8, 8, 9))
    ]
    with pytest.raises(ValueError, match=r"\(8, 8, 8\), \(8, 8, 9\).*patch_shape"):
        collate_batches(batches)


def test_a_cohort_without_splits_is_split_and_says_so_in_the_run_only(cohort, tmp_path, caplog):
    before = sorted(cohort.rglob("*"))
    with caplog.at_level(logging.INFO):
        data = PairedVolumes(cohort, cache_dir=tmp_path / "cache")
        data.setup()
    assert "no splits file: 70/15/15 by patient, seed 42" in caplog.text
    data.write_splits(tmp_path / "run" / "splits.json")
    assert read_splits(tmp_path / "run") == data.splits
    assert sorted(cohort.rglob("*")) == before
    assert {split: len(cases) for split, cases in data.splits.items()} == {
        "train": 6, "val": 1, "test": 1,
    }  # fmt: skip


def test_the_splits_of_a_cohort_are_kept_and_checked(cohort):
    splits = {"train": ["case_00"], "val": ["case_01"], "test": ["case_02", "case_03"]}
    (cohort / "splits.json").write_text(json.dumps(splits))
    assert PairedVolumes(cohort).splits == splits
    (cohort / "splits.json").write_text(json.dumps({**splits, "val": ["case_99"]}))
    with pytest.raises(FileNotFoundError, match="case_99"):
        PairedVolumes(cohort).setup()
    for case in ("case_00", "case_02"):
        (cohort / case / "study.json").write_text('{"patient": "anna"}')
    (cohort / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match="'anna' in train"):
        PairedVolumes(cohort).setup()
    patients = PairedVolumes(cohort).patients
    assert patients == {case: case for case in patients} | {"case_00": "anna", "case_02": "anna"}
    assert len(patients) == 8


def test_the_cohort_is_prepared_before_it_is_read(make_study, tmp_path):
    def prepare(root):
        assert root == tmp_path / "cohort"
        make_study("case_00")

    data = PairedVolumes(tmp_path / "cohort", prepare=prepare, splits={"train": ["case_00"]})
    data.prepare_data()
    assert len(draws(data)) == 1


def test_a_cohort_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
        PairedVolumes(tmp_path / "none").setup("fit")


def test_the_facts_of_a_cohort_go_into_json(cohort):
    facts = PairedVolumes(cohort).describe()
    assert json.loads(json.dumps(facts))["cases"] == {"train": 6, "val": 1, "test": 1}
    assert facts["spacings_mm_dhw"] == [SPACING_MM] and facts["ct_units"] == ["HU"]
    assert facts["cases_with_lesion"] == 8 and facts["cases_with_own_reference"] == 0
    assert list(facts["mask_sources"]["brain"]) == ["file"]


def test_real_patients_of_odd_depth_make_batches(shared_data, tmp_path):
    root = shared_data / "harvard_studies"
    if not root.is_dir():
        pytest.skip(f"no studies at {root}")
    splits = {"train": ["case_28", "case_02"]}
    options = {"splits": splits, "cache_dir": tmp_path, "jitter": JITTER}
    (patches,) = draws(PairedVolumes(root, batch_size=2, patch_shape=(16, 128, 128), **options))
    assert patches.mri.shape == (2, 1, 16, 128, 128) and len(set(patches.case_id)) == 2
    whole = draws(PairedVolumes(root, **options))
    assert {batch.mri.shape[2:] for batch in whole} == {(16, 256, 256), (19, 256, 256)}
