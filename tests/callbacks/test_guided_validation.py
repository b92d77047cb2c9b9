import lightning
import pytest
import torch
from PIL import Image

from clinfuse.callbacks.guided_validation import GuidedValidation
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

    def logged(method):
        return trainer.validate(method, datamodule=data, verbose=False)[0]

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


class Broken(FusionMethod):
    """Fuses one case to nothing that is a number."""

    def fuse(self, batch):
        return torch.full_like(batch.mri, torch.nan) if batch.case_id == ["case_007"] else batch.mri


def test_a_model_that_diverged_is_refused_and_not_scored_on_what_is_left(validate):
    with pytest.raises(ValueError, match="finite"):
        validate(Broken())
