import lightning
import numpy as np
import pytest
import torch
from PIL import Image

from clinfuse.callbacks.guided_validation import GuidedValidation
from clinfuse.callbacks.loggers import wandb_logger
from clinfuse.data.paired_slices import PairedSlices
from clinfuse.functional.psnr import psnr
from clinfuse.functional.ssim import ssim
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.rules import MaskComposite, Weighted


@pytest.fixture
def data(phantoms):
    data = phantoms.data()
    data._asked_splits = {"train": ["case_000"], "val": ["case_001", "case_007"], "test": []}
    return data


@pytest.fixture
def validate(tmp_path, data):
    """Validates a method and returns what was logged; the same trainer every time."""
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[GuidedValidation(tmp_path / "figures")], enable_checkpointing=False,
    )  # fmt: skip

    def logged(method, datamodule=data):
        return trainer.validate(method, datamodule=datamodule, verbose=False)[0]

    return logged


def test_validation_scores_all_cases_draws_the_first_and_starts_anew_each_time(
    tmp_path, data, validate
):
    validate(Weighted(0.5))  # leaves nothing behind in the scores of the next
    logged = validate(MaskComposite())
    batches = list(data.val_dataloader())
    assert [batch.case_id for batch in batches] == [["case_001"], ["case_007"]]
    expected = {
        "val/brain_ssim": [],
        "val/bone_psnr": [],
        "val/bone_ssim": [],
        "val/whole_ssim": [],
    }
    for batch in batches:
        fused, spacing_mm = MaskComposite().fuse(batch), batch.spacing_mm
        brain, bone, _ = batch.clean_roi.split(1, 1)
        like = {
            "val/brain_ssim": (batch.clean_mri, brain),
            "val/bone_ssim": (batch.clean_ct, bone),
            "val/whole_ssim": (batch.reference, torch.ones_like(brain)),
        }
        for name, (aim, mask) in like.items():
            expected[name].append(ssim(fused + 1, aim + 1, mask, spacing_mm).item())
        expected["val/bone_psnr"].append(psnr(fused, batch.clean_ct, bone).item())
    assert logged == pytest.approx({name: sum(v) / 2 for name, v in expected.items()}, rel=1e-4)

    (picture,) = (tmp_path / "figures").iterdir()
    assert picture.name == "validation_step_000000.png"
    assert Image.open(picture).size[0] > 300


def test_wandb_sees_the_regions_over_the_first_case_of_a_volume(no_account, data, wandb_reading):
    logger = wandb_logger(no_account, "smoke", "clinfuse")
    trainer = lightning.Trainer(
        accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[GuidedValidation(no_account / "figures")], enable_checkpointing=False,
    )  # fmt: skip
    trainer.validate(MaskComposite(), datamodule=data, verbose=False)
    logger.finish()
    run, (batch, _) = wandb_reading(no_account), data.val_dataloader()
    assert list(run.pictures("validation")) == ["validation at step 0"]
    captions = [f"case_001: {name}" for name in ("MRI", "CT as given", "Fused")]
    assert list(run.pictures("validation_regions")) == captions
    _, _, fused = (np.asarray(Image.open(p)) for p in run.pictures("validation_regions").values())
    masks = {
        name: np.asarray(Image.open(run.folder / "files" / mask["path"])) > 0
        for name, mask in run.summary["validation_regions.all_masks"][0].items()
    }
    brain, bone = (mask[0].numpy()[:, ::-1, ::-1] for mask in batch.clean_roi[0].split(1)[:2])
    (at,) = [d for d, plane in enumerate(brain) if (plane == masks["brain"]).all()]
    np.testing.assert_array_equal(masks["bone"], bone[at])
    composite = MaskComposite().fuse(batch)[0, 0, at].numpy()[::-1, ::-1]
    np.testing.assert_allclose(fused, 255 * (composite + 1) / 2, atol=0.51)


def save(folder, name, values):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(folder / f"{name}.png")


def pairs(folder, kind, second):
    """Two slices of 40 by 48 pixels: a grey MRI with a bright stripe, and a second source."""
    mri = np.full((40, 48), 60)
    mri[:, 20:28] = 240
    for name in ("20001", "20002"):
        save(folder / "MRI", name, mri)
        save(folder / kind, name, second)
    return PairedSlices(folder, f"{kind.lower()}_mri", splits={"val": ["20001", "20002"]})


def test_a_pair_of_pictures_is_shown_beside_what_it_was_fused_to(tmp_path, validate):
    orange = np.broadcast_to([250, 120, 10], (40, 48, 3))
    assert validate(Weighted(0.5), pairs(tmp_path / "set", "SPECT", orange)) == {}  # no masks
    shown = np.asarray(Image.open(tmp_path / "figures" / "validation_step_000000.png"))
    is_orange = (np.abs(shown[..., :3].astype(int) - (250, 120, 10)) < 12).all(-1)
    of_columns = [part.mean() for part in np.array_split(is_orange, 3, axis=1)]
    assert of_columns[0] == 0 and of_columns[1] > 0.5  # the SPECT as it is, in the middle
    colour = shown[..., 0].astype(int) - shown[..., 2]
    third = np.array_split(colour, 3, axis=1)[2]
    assert (third > 60).mean() > 0.5  # and its hue in the fused picture


def test_slices_of_ct_are_scored_in_brain_and_bone(tmp_path, validate):
    h, w = np.mgrid[-20:20, -24:24]
    radius = np.hypot(h / 19, w / 22)
    ct = 90 * (radius < 0.75) + 255 * ((radius >= 0.75) & (radius < 1))
    logged = validate(Weighted(0.0), pairs(tmp_path / "set", "CT", ct))
    assert logged["val/bone_ssim"] == pytest.approx(1, abs=1e-4)  # it is the CT
    assert set(logged) == {"val/brain_ssim", "val/bone_psnr", "val/bone_ssim"}
    assert (tmp_path / "figures" / "validation_step_000000.png").is_file()


class Broken(FusionMethod):
    """Fuses one case to nothing that is a number."""

    def fuse(self, batch):
        return torch.full_like(batch.mri, torch.nan) if batch.case_id == ["case_007"] else batch.mri


def test_a_model_that_diverged_is_refused_and_not_scored_on_what_is_left(validate):
    with pytest.raises(ValueError, match="finite"):
        validate(Broken())
