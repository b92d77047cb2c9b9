import lightning
import pytest
import torch
from PIL import Image

from clinfuse.callbacks.guided_validation import GuidedValidation
from clinfuse.functional.psnr import psnr
from clinfuse.functional.ssim import ssim
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.rules import MaskComposite


def validated(method, data, folder, **settings):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[GuidedValidation(folder)], inference_mode=False, enable_checkpointing=False,
        **settings,
    )  # fmt: skip
    (logged,) = trainer.validate(method, datamodule=data, verbose=False)
    return logged


@pytest.fixture
def data(phantoms):
    data = phantoms.data()
    data._asked_splits = {"train": ["case_000"], "val": ["case_001", "case_007"], "test": []}
    return data


def test_validation_logs_each_metric_of_the_fused_volumes_over_all_cases(tmp_path, data):
    logged = validated(MaskComposite(), data, tmp_path)
    batches = list(data.val_dataloader())
    assert [batch.case_id for batch in batches] == [["case_001"], ["case_007"]]
    expected = {"val/brain_ssim": [], "val/bone_psnr": [], "val/bone_ssim": [], "val/whole_ssim": []}
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


def test_a_second_validation_starts_anew(tmp_path, data):
    callback = GuidedValidation(tmp_path)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback], enable_checkpointing=False,
    )  # fmt: skip
    first = trainer.validate(MaskComposite(), datamodule=data, verbose=False)
    assert trainer.validate(MaskComposite(), datamodule=data, verbose=False) == first


def test_the_first_case_is_drawn(tmp_path, data):
    validated(MaskComposite(), data, tmp_path / "figures")
    (picture,) = (tmp_path / "figures").iterdir()
    assert picture.name == "validation_step_000000.png"
    assert Image.open(picture).size[0] > 300


def test_validation_samples_a_diffusion_model_with_its_guidance(tmp_path, data, phantoms):
    def score(*overrides):
        method = phantoms.method("clinfuse", *overrides)
        return validated(method, data, tmp_path, limit_val_batches=1)["val/bone_psnr"]

    assert score("guidance.eta=0.5") != score("guidance.eta=0.0", "guidance.eta_u=0.0")


class Broken(FusionMethod):
    """Fuses to nothing that is a number."""

    def fuse(self, batch):
        return torch.full_like(batch.mri, torch.nan)


def test_a_model_that_diverged_is_not_scored_on_what_is_left(tmp_path, data):
    with pytest.raises(ValueError, match="finite"):
        validated(Broken(), data, tmp_path)
