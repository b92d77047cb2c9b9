import json
import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clinfuse.data.jitter import RegistrationJitter
from clinfuse.data.paired_slices import (
    PairedSlices,
    collate_slices,
    fixed_in_plane,
    jitter_in_plane,
    random_patch,
    slice_item,
)
from clinfuse.data.slices import Slice, read_picture
from clinfuse.data.splits import read_splits_file
from clinfuse.evaluate import main as evaluate
from clinfuse.functional.colour import rgb_to_ycbcr
from clinfuse.functional.warp import rigid_displacement, warp
from clinfuse.train import main as train

NAMES = [f"{case}{number:03d}" for case in (10, 11, 12, 13, 2) for number in (7, 8, 9)]
STILL = torch.eye(3, dtype=torch.float64)
SPACING_MM = (0.9, 0.9)


def spot(centre, shape=(60, 72), width=9.0):
    """A smooth bright spot at (h, w)."""
    h, w = np.mgrid[: shape[0], : shape[1]]
    return np.exp(-((h - centre[0]) ** 2 + (w - centre[1]) ** 2) / (2 * width**2))


def write_pair(root, name, shape=(60, 72), functional="SPECT"):
    number = sum(map(ord, name)) % 7
    colours = np.stack([c * spot((30, 30 + number), shape) for c in (250, 120, 60)], -1)
    for folder, pixels in ((functional, colours), ("MRI", 200 * spot((25, 40), shape))):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    for name in NAMES:
        write_pair(tmp_path / "set", name)
    return tmp_path / "set"


def pair(shape=(60, 72)):
    """A pair whose second source, colour and bone are one smooth spot."""
    moving = torch.from_numpy(spot((30, 30), shape)).float()[None]
    return Slice(
        case_id="a",
        mri=torch.from_numpy(2 * spot((25, 40), shape) - 1).float()[None],
        ct=2 * moving - 1,
        chroma=torch.cat((-0.4 * moving, 0.3 * moving)),
        roi=torch.cat((moving > 0.2, moving > 0.5, moving > 2)),
        spacing_mm=SPACING_MM,
    )


def test_a_patient_is_in_one_split_and_every_slice_is_used(root):
    splits = PairedSlices(root, "spect_mri").splits
    assert sorted(name for split in splits.values() for name in split) == sorted(NAMES)
    cases = [{name[:-3] for name in split} for split in splits.values()]
    assert all(cases) and sum(map(len, cases)) == 5


def test_splits_are_recorded_where_they_are_asked_for_and_read_again(root, tmp_path):
    data = PairedSlices(root, "spect_mri")
    before = sorted(path for path in root.rglob("*"))
    data.write_splits(tmp_path / "run" / "splits.json")
    assert sorted(path for path in root.rglob("*")) == before
    again = PairedSlices(root, "spect_mri", splits_file=tmp_path / "run" / "splits.json")
    assert again.splits == data.splits == read_splits_file(tmp_path / "run" / "splits.json")
    assert json.loads((tmp_path / "run" / "splits.json").read_text())["source"].startswith("made:")


@pytest.mark.parametrize(
    "lists",
    [
        {"train": ["10", "11"], "val": ["12"], "test": [2]},
        {"splits": {"train": [*NAMES[:6]], "val": [*NAMES[6:9]], "test": ["2"]}, "seed": 1},
        {
            "train": [f"SPECT/{name}.png" for name in NAMES[:6]],
            "val": [f"{name}.png" for name in NAMES[6:9]],
            "test": NAMES[-3:],
        },
    ],
)
def test_split_info_lists_patients_pairs_or_files(root, lists):
    (root / "split_info.json").write_text(json.dumps(lists))
    splits = PairedSlices(root, "spect_mri").splits
    assert splits == {"train": NAMES[:6], "val": NAMES[6:9], "test": NAMES[-3:]}


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"train": ["10007"], "test": ["10008"]}, r"'10' in train \(as '10007'\) and test"),
        ({"train": ["10"], "test": ["10009"]}, "'10' in train"),
        ({"train": ["10", "10007"]}, r"\['10007'\] twice in train"),
    ],
)
def test_slices_of_one_patient_in_two_splits_are_refused(root, splits, words):
    with pytest.raises(ValueError, match=words):
        _ = PairedSlices(root, "spect_mri", splits=splits).splits


def test_a_name_that_the_set_does_not_have_is_refused(root):
    with pytest.raises(FileNotFoundError, match=r"the configuration, no \['99', '99001'\]"):
        _ = PairedSlices(root, "spect_mri", splits={"test": ["99", "99001", "10"]}).splits


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"trian": ["10"], "test": ["11"]}, r"lists train, val and test, got \['test', 'trian'\]"),
        ({"test": "all"}, "splits.test to be a list of names or patients, got 'all'"),
        ({"test": 12}, "splits.test to be a list of names or patients, got 12"),
        ({"test": ["11"], "train": None}, "splits.train to be a list .*, got None"),
        ({"test": [["11"]]}, r"splits.test to be a list .*, got \[\['11'\]\]"),
    ],
)
def test_lists_that_are_none_are_refused_before_anything_is_read(tmp_path, splits, words):
    with pytest.raises(ValueError, match=words):
        PairedSlices(tmp_path / "not yet there", "spect_mri", splits=splits)


def test_what_yaml_takes_for_something_else_than_lists_ends_in_a_sentence(
    root, entry_point, tmp_path
):
    done = entry_point(
        "clinfuse.evaluate", "method=average", "data=paired_slices", f"data.root={root}",
        "data.kind=spect_mri", "data.splits=all", f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "clinfuse: expected splits of lists train, val and test, got all" in done.stderr
    assert not (tmp_path / "run" / "cases.csv").exists()


def test_a_folder_whose_name_yaml_takes_for_a_number_is_found(tmp_path, monkeypatch):
    write_pair(tmp_path / "2024", "10007")
    monkeypatch.chdir(tmp_path)
    assert list(PairedSlices(2024, "spect_mri").pairs) == ["10007"]


def test_a_whole_set_can_be_fused(root):
    splits = PairedSlices(root, "spect_mri", splits={"test": ["all"]}).splits
    assert sorted(splits["test"]) == sorted(NAMES) and not splits["train"]


def test_folders_of_train_val_and_test_are_the_splits_and_a_leak_among_them_is_refused(tmp_path):
    for split, names in (("train", NAMES[:6]), ("test", NAMES[6:9])):
        for name in names:
            write_pair(tmp_path / split, name)
    (tmp_path / "split_info.json").write_text('{"train": 6, "val": 0, "test": 3}')
    expected = {"train": NAMES[:6], "val": [], "test": NAMES[6:9]}
    assert PairedSlices(tmp_path, "spect_mri").splits == expected
    moved = {**expected, "test": NAMES[6:8], "val": NAMES[8:9]}
    (tmp_path / "split_info.json").write_text(json.dumps(moved))
    with pytest.raises(ValueError, match=r"lists that agree with the folders, got \['12009'\]"):
        _ = PairedSlices(tmp_path, "spect_mri").splits
    (tmp_path / "split_info.json").unlink()
    write_pair(tmp_path / "test", "10010")
    with pytest.raises(ValueError, match="'10' in train"):
        _ = PairedSlices(tmp_path, "spect_mri").splits


def test_splits_that_must_leak_are_made_with_a_warning(tmp_path, caplog):
    for name in ("25001", "25002", "30001", "41001"):
        write_pair(tmp_path / "one_head", name, functional="PET")
    data = PairedSlices(tmp_path / "one_head", "pet_mri")
    splits = data.splits
    assert all(splits.values())
    assert set(data.patients) == {"25001", "25002", "30001", "41001"}
    assert len(set(data.patients.values())) == 1  # to statistics they are one head still
    assert any({"25001", "25002"} <= set(names) for names in splits.values())  # by case at least
    assert "4 pairs are of one patient (cases 25, 30, 41), so any split leaks" in caplog.text
    for name in ("0000", "0001", "0002"):
        write_pair(tmp_path / "numbered", name)
    assert all(PairedSlices(tmp_path / "numbered", "spect_mri").splits.values())
    assert "3 of 3 names (0000 first) do not say whose slice it is" in caplog.text


def test_without_test_pairs_testing_says_so(root):
    data = PairedSlices(root, "spect_mri", splits={"train": ["10"]})
    data.setup("fit")
    said = "expected pairs to test with, got none of 15 of 5 patients"
    for ask in (lambda: data.setup("test"), data.test_dataloader):
        with pytest.raises(ValueError, match=said):
            ask()


def test_a_batch_has_what_a_method_may_see_and_no_invented_truth(root):
    data = PairedSlices(root, "spect_mri", batch_size=2)
    batch = next(iter(data.train_dataloader()))
    assert batch.mri.shape == batch.ct.shape == (2, 1, 60, 72) and batch.roi.shape == (2, 3, 60, 72)
    assert batch.chroma.shape == (2, 2, 60, 72) and batch.spacing_mm.shape == (2, 2)
    assert batch.reference is None and not batch.roi.any() and list(batch.ct_map) == []
    assert slice_item(replace(pair(), is_ct=True), STILL).ct_map == ["window_8bit"]
    assert torch.equal(batch.ct, batch.clean_ct)
    assert batch.to("cpu").chroma is not None and batch.repeat(2).chroma.shape[0] == 4


def test_everything_of_the_second_source_moves_together_and_nothing_else_does():
    matrix = fixed_in_plane("a", 6.0, 8.0)
    still, moved = slice_item(pair(), STILL), slice_item(pair(), matrix)
    assert torch.equal(still.ct, still.clean_ct)
    for name in ("mri", "clean_ct", "clean_roi"):
        assert torch.equal(getattr(moved, name), getattr(still, name))
    assert not torch.equal(moved.bone, still.bone)
    # Cb, Cr and masks were made from the CT, so they still agree with it
    spot_moved = (moved.ct + 1) / 2
    torch.testing.assert_close(moved.chroma[:, :1], -0.4 * spot_moved, atol=1e-4, rtol=0)
    torch.testing.assert_close(moved.chroma[:, 1:], 0.3 * spot_moved, atol=1e-4, rtol=0)
    bone = spot_moved > 0.5  # by a spline; the mask itself is moved linearly
    assert 2 * (moved.bone & bone).sum() / (moved.bone.sum() + bone.sum()) > 0.98
    assert 2 * (still.bone & bone).sum() / (still.bone.sum() + bone.sum()) < 0.8
    both = slice_item(replace(pair(), roi=pair().roi[[1, 1, 2]]), matrix)
    assert torch.equal(both.brain, both.bone)  # a brain in the same place moves as far
    displacement = rigid_displacement(moved.misregistration, (60, 72), SPACING_MM)
    back = warp(moved.ct, displacement, SPACING_MM, refine=4)
    inside = (..., slice(12, -12), slice(12, -12))
    assert (moved.ct - still.ct)[inside].abs().max() > 0.5
    assert (back - still.ct)[inside].abs().max() < 0.01


@pytest.mark.parametrize("amplitude", [0.0, 1.0, 4.0])
def test_fixed_misregistration_shifts_and_turns_by_exactly_its_amplitude(amplitude):
    matrices = [fixed_in_plane(f"case_{i}", amplitude, 2 * amplitude) for i in range(200)]
    shifts = torch.stack([matrix[:2, 2] for matrix in matrices])
    assert shifts.norm(dim=1).numpy() == pytest.approx(np.full(200, amplitude))
    degrees = [float(torch.rad2deg(torch.atan2(m[1, 0], m[0, 0]))) for m in matrices]
    assert np.abs(degrees) == pytest.approx(np.full(200, 2 * amplitude), abs=1e-5)
    if amplitude:  # 200 unit vectors: the mean is sqrt(1 / 200) = 0.07 long, root mean square
        assert shifts.mean(0).norm() / amplitude < 0.25
        assert 60 < sum(angle > 0 for angle in degrees) < 140


def test_loaders_move_each_pair_by_the_amplitude_degrees_and_seed_asked_for(root):
    data = PairedSlices(
        root, "spect_mri", misregistration_mm=(0.0, 3.0), val_misregistration_mm=2.0,
        misregistration_deg_per_mm=2.0, misregistration_seed=5,
        splits={"val": ["12"], "test": ["11"]},
    )  # fmt: skip
    loaders = (*data.test_dataloader(), data.val_dataloader())
    for loader, amplitude in zip(loaders, (0.0, 3.0, 2.0), strict=True):
        for batch in loader:
            expected = fixed_in_plane(batch.case_id[0], amplitude, 2 * amplitude, seed=5)
            torch.testing.assert_close(batch.misregistration[0], expected.float())


def test_jitter_stays_in_the_plane_and_has_the_amplitude_and_frequency_asked_for():
    jitter, generator = RegistrationJitter(2.0, 3.0, 0.4), torch.Generator().manual_seed(1)
    matrices = torch.stack([jitter_in_plane(jitter, generator) for _ in range(4000)])
    moved = (matrices - STILL).flatten(1).any(1)
    assert moved.double().mean() == pytest.approx(0.4, abs=0.031)  # four standard errors
    matrices = matrices[moved]
    degrees = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    for values, most in ((matrices[:, 0, 2], 2), (matrices[:, 1, 2], 2), (degrees, 3)):
        # of 1600 uniform draws: the largest is within 1 %, the s.d. most / sqrt(3) within 5 %
        assert 0.99 * most < float(values.abs().max()) <= most
        assert float(values.std()) == pytest.approx(most / 3**0.5, rel=0.05)


def test_a_patch_is_cut_alike_from_everything_and_states_its_own_misregistration():
    item = slice_item(pair(), fixed_in_plane("a", 5.0, 6.0))
    patch = random_patch(item, (40, 48), torch.Generator().manual_seed(0))
    assert patch.mri.shape[2:] == (40, 48) and patch.chroma.shape == (1, 2, 40, 48)
    places = [
        (h, w)
        for h in range(21)
        for w in range(25)
        if torch.equal(item.mri[..., h : h + 40, w : w + 48], patch.mri)
    ]
    ((h, w),) = places
    for name in ("ct", "chroma", "roi", "clean_ct"):
        assert torch.equal(getattr(item, name)[..., h : h + 40, w : w + 48], getattr(patch, name))
    displacement = rigid_displacement(patch.misregistration, (40, 48), SPACING_MM)
    whole = rigid_displacement(item.misregistration, (60, 72), SPACING_MM)
    torch.testing.assert_close(displacement, whole[..., h : h + 40, w : w + 48])


def test_a_patch_shows_something_of_one_source_or_the_other():
    mri, ct = torch.full((2, 1, 60, 72), -1.0)
    mri[0, 50, 10], ct[0, 5, 60] = 0.5, 0.5
    item, generator = slice_item(replace(pair(), mri=mri, ct=ct), STILL), torch.Generator()
    patches = [random_patch(item, (8, 8), generator.manual_seed(seed)) for seed in range(20)]
    shown = {(bool((patch.mri > -1).any()), bool((patch.ct > -1).any())) for patch in patches}
    assert shown == {(True, False), (False, True)}


def test_a_patch_larger_than_the_picture_is_padded_with_black():
    item = slice_item(pair(), fixed_in_plane("a", 5.0, 6.0))
    patch = random_patch(item, (80, 100), torch.Generator().manual_seed(0))
    assert torch.equal(patch.ct[..., :60, :72], item.ct) and (patch.ct[..., 60:, :] == -1).all()
    assert (patch.mri[..., 72:] == -1).all() and not patch.chroma[..., 60:, :].any()
    assert not patch.roi[..., 72:].any() and (patch.lesion_distance_mm > 0).all()
    displacement = rigid_displacement(patch.misregistration, (80, 100), SPACING_MM)
    whole = rigid_displacement(item.misregistration, (60, 72), SPACING_MM)
    torch.testing.assert_close(displacement[..., :60, :72], whole)


def test_draws_depend_on_the_seed_alone_and_every_pair_is_drawn(root):
    def draws(seed, workers=0):
        data = PairedSlices(
            root, "spect_mri", jitter=RegistrationJitter(3, 3, 1), patch_shape=(32, 32),
            seed=seed, num_workers=workers, splits={"train": ["all"]},
        )  # fmt: skip
        return list(data.train_dataloader())

    here, elsewhere, other = draws(1), draws(1, workers=1), draws(2)
    assert Counter(batch.case_id[0] for batch in here) == Counter(NAMES)
    assert all(torch.equal(a.ct, b.ct) for a, b in zip(here, elsewhere, strict=True))
    assert not any(torch.equal(a.ct, b.ct) for a, b in zip(here, other, strict=True))


def test_pictures_of_two_sizes_do_not_make_a_batch_without_patches(root):
    write_pair(root, "10010", shape=(50, 64))
    items = [slice_item(pair(shape), STILL) for shape in ((60, 72), (50, 64))]
    with pytest.raises(ValueError, match=r"cases of one size .* set patch_shape, or a batch size"):
        collate_slices(items)
    names = {"train": ["10"]}
    whole = PairedSlices(root, "spect_mri", batch_size=2, draws_per_epoch=2, splits=names)
    said = r"batches of 2 without a patch_shape, got \(72, 60\) in .*10007.* \(64, 50\) in .*10010"
    with pytest.raises(ValueError, match=said):  # whichever two are drawn
        whole.train_dataloader()
    patches = {"batch_size": 4, "patch_shape": (32, 32), "splits": names}
    (batch,) = PairedSlices(root, "spect_mri", **patches).train_dataloader()
    assert batch.mri.shape == (4, 1, 32, 32)


def test_evaluating_a_rule_writes_rows_splits_and_every_fused_picture_in_colour(
    root, phantoms, tmp_path, caplog
):
    overrides = (
        "method=average", "baselines=[maximum]", "data=paired_slices", f"data.root={root}",
        "data.kind=spect_mri", "data.splits={test:[11,2]}", "misregistration_mm=[0,3]",
    )  # fmt: skip
    evaluate(phantoms.config(*overrides, name="evaluate", folder=tmp_path))
    tested = {"11007", "11008", "11009", "2007", "2008", "2009"}
    for method in ("average", "maximum"):
        written = {path.stem for path in (tmp_path / "fused" / method).iterdir()}
        assert written == tested
    name = "11008"
    fused, spect, mri = (
        rgb_to_ycbcr(read_picture(path)[None].double())[0] * 255
        for path in (
            tmp_path / "fused" / "average" / f"{name}.png",
            root / "SPECT" / f"{name}.png",
            root / "MRI" / f"{name}.png",
        )
    )
    assert (fused[0] - (spect[0] + mri[0]) / 2).abs().max() < 0.51  # R, G and B are rounded
    inside = spect[0] > 100  # and RGB has the colour there
    assert inside.any() and (fused[1:] - spect[1:])[:, inside].abs().max() < 0.51
    rows = pd.read_csv(tmp_path / "cases.csv", dtype={"case_id": str})
    assert set(rows["case_id"]) == tested and set(rows["misregistration_mm"]) == {0.0, 3.0}
    compared = rows["metric"].isin(["psnr", "ssim", "fsim"]) | rows["roi"].isin(["brain", "bone"])
    assert rows[compared]["value"].isna().all()  # no masks and no reference
    assert rows[rows["metric"] == "qabf"]["value"].between(0.1, 0.9).all()  # of the sources alone
    patients = pd.read_csv(tmp_path / "cases.csv", dtype=str).set_index("case_id")["patient_id"]
    assert set(patients["11007"]) == {"11"} and set(patients["2009"]) == {"2"}
    recorded = read_splits_file(tmp_path / "splits.json")
    assert set(recorded["test"]) == tested
    report = (tmp_path / "report.html").read_text()
    assert "average: 11007" in report and "<image" in report


def test_a_rule_is_trained_and_tested_on_slices_of_ct_with_masks(phantoms, tmp_path):
    h, w = np.mgrid[-30:30, -36:36]
    radius = np.hypot(h / 27, w / 30)
    for name in ("20001", "22001", "28001"):
        for folder, values in (
            ("CT", 90 * (radius < 0.8) + 255 * ((radius >= 0.8) & (radius < 1))),
            ("MRI", 150 * (radius < 0.8) + 40 * (h > 0)),
        ):
            (tmp_path / "CT-MRI" / folder).mkdir(parents=True, exist_ok=True)
            path = tmp_path / "CT-MRI" / folder / f"{name}.png"
            Image.fromarray(values.astype(np.uint8)).save(path)
    folder = tmp_path / "run"
    overrides = (
        "method=average", "data=paired_slices", f"data.root={tmp_path}", "data.kind=ct_mri",
        "logger=csv", "trainer.precision=32-true",
    )  # fmt: skip
    train(phantoms.config(*overrides, folder=folder))
    (name,) = read_splits_file(folder / "splits.json")["test"]
    image = Image.open(folder / "fused" / "average" / f"{name}.png")
    ct, mri = (
        np.asarray(Image.open(tmp_path / "CT-MRI" / s / f"{name}.png")).astype(float)
        for s in ("CT", "MRI")
    )
    assert image.mode == "L" and np.abs(np.asarray(image) - (ct + mri) / 2).max() <= 0.5
    rows = pd.read_csv(folder / "cases.csv").set_index(["roi", "metric"])["value"]
    bone = (radius >= 0.8) & (radius < 1)
    error = ((mri - ct) / 2 / 255)[bone]
    assert rows["bone", "psnr"] == pytest.approx(-10 * np.log10((error**2).mean()), abs=0.01)
    assert np.isfinite(rows["brain", "ssim"]) and np.isnan(rows["whole", "ssim"])
    facts = json.loads((folder / "facts.json").read_text())["data"]
    assert facts["mask_sources"] == {"brain": "segmented", "bone": "segmented", "lesion": "absent"}


def test_the_real_spect_patients_are_dealt_whole(shared_data, caplog):
    data = PairedSlices(shared_data / "harvard_aanlib", "spect_mri")
    assert {split: len(p) for split, p in data.describe()["patients"].items()} == {
        "train": 8,
        "val": 2,
        "test": 2,
    }
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_split_by_slice_leaks_and_says_so(root, caplog):
    data = PairedSlices(root, "spect_mri", split="community")
    with caplog.at_level(logging.WARNING):
        splits = data.splits
    assert sum(map(len, splits.values())) == len(NAMES)
    train, test = ({data.patients[name] for name in splits[s]} for s in ("train", "test"))
    assert train & test
    assert "neighbouring slices of a patient train and test" in caplog.text
    assert data.describe()["split_by"] == "slice" and "leaks" in data.describe()["splits_source"]
    assert PairedSlices(root, "spect_mri").describe()["split_by"] == "patient"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "random"}, "expected split=patient or split=community, got 'random'"),
        ({"split": "community", "splits": {"test": ["all"]}}, "without splits"),
    ],
)
def test_a_split_that_is_not_known_or_asked_for_twice_is_refused(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        PairedSlices(root, "spect_mri", **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"patch_shape": (8, 32, 32)}, r"patch_shape \(h, w\) of at least 8 .*, got \(8, 32, 32\)"),
        ({"patch_shape": (0, 32)}, r"patch_shape \(h, w\) of at least 8 .*, got \(0, 32\)"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"draws_per_epoch": 0}, "draws_per_epoch of at least 1, got 0"),
        ({"draws_per_epoch": -3}, "draws_per_epoch of at least 1, got -3"),
        ({"misregistration_mm": [0, float("nan")]}, r"a list of numbers, got \[0, nan\]"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_read(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        PairedSlices(root, "spect_mri", **arguments)


def test_references_are_made_of_clean_sources_for_training_and_kept_but_not_for_test(
    root, tmp_path
):
    asked = []

    class Mean:
        def __repr__(self):
            return "the mean"

        def __call__(self, mri, ct):
            asked.append(1)
            return (mri + ct) / 2

    def data():
        moved = RegistrationJitter(max_mm=4.0, max_deg=0.0, probability=1.0)
        return PairedSlices(
            root, "spect_mri", reference=Mean(), cache_dir=tmp_path / "cache", jitter=moved
        )

    first = data()
    batches = [*first.train_dataloader(), *first.val_dataloader()]
    for batch in batches:
        assert torch.equal(batch.reference, (batch.clean_mri + batch.clean_ct) / 2)
    made = len(asked)
    assert made >= 3  # pairs of equal pictures share theirs
    assert all(batch.reference is None for batch in first.test_dataloader()[0])
    again = data()
    for batch, before in zip(again.train_dataloader(), batches, strict=False):
        assert torch.equal(batch.reference, before.reference)
    assert len(asked) == made  # they came from the cache


def refuse(mri, ct):
    raise ValueError("expected slices of at least 999 pixels a side")


def test_a_pair_that_no_reference_can_be_made_of_is_named(root):
    data = PairedSlices(root, "spect_mri", reference=refuse, splits={"train": ["10007"]})
    with pytest.raises(ValueError, match=r"999 pixels a side: .*MRI.10007\.png"):
        data.train_dataloader()


def test_black_pictures_of_two_sizes_do_not_share_a_reference_and_a_damaged_one_is_named(tmp_path):
    for name, (h, w) in (("10007", (40, 50)), ("10008", (50, 40))):
        for folder in ("MRI", "SPECT"):
            path = tmp_path / "set" / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((h, w), np.uint8)).save(path)

    def shapes():
        data = PairedSlices(
            tmp_path / "set", "spect_mri", reference=torch.maximum, cache_dir=tmp_path / "cache",
            splits={"train": ["all"]},
        )  # fmt: skip
        return {tuple(batch.reference.shape[2:]) for batch in data.train_dataloader()}

    assert shapes() == shapes() == {(40, 50), (50, 40)}
    for path in (tmp_path / "cache" / "references").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"reference as it was kept here, got .*\.npy \(delete it"):
        shapes()


def test_a_pair_without_any_edge_is_evaluated_and_what_it_leaves_undefined_is_nan_and_counted(
    phantoms, tmp_path
):
    root = tmp_path / "set"
    for folder, centre in (("CT", (30, 36)), ("MRI", (25, 40))):
        (root / folder).mkdir(parents=True)
        for name, pixels in (("10007", np.zeros((60, 72))), ("11007", 200 * spot(centre))):
            Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{name}.png")
    overrides = (
        "method=average", "data=paired_slices", f"data.root={root}", "data.kind=ct_mri",
        "data.splits={test:[all]}", "misregistration_mm=[0]",
    )  # fmt: skip
    evaluate(phantoms.config(*overrides, name="evaluate", folder=tmp_path / "run"))
    rows = pd.read_csv(tmp_path / "run" / "cases.csv", dtype={"case_id": str})
    values = rows[rows["roi"] == "whole"].pivot(index="case_id", columns="metric", values="value")
    of_edges = ["scd", "vif", "qabf", "epi"]
    assert values.loc["10007", of_edges].isna().all()
    assert values.loc["11007", of_edges].notna().all()
    assert "undefined left out" in (tmp_path / "run" / "report.html").read_text()
