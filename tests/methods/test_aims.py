from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clinfuse.configuration import trained_method
from clinfuse.methods.aims import aims_of
from clinfuse.train import main as train

TRAINED = {"weighted_by_roi": "logits", "trainable_wavelet": "network.last.weight"}
"""Methods and a weight of each that starts at zero."""


def test_a_phantom_is_compared_with_its_reference_alone(phantoms):
    batch = phantoms.batch(4.0)
    assert all(aim is batch.reference for aim in aims_of(batch))


def test_a_pair_without_reference_is_compared_with_itself_unmoved(phantoms):
    batch = replace(phantoms.batch(4.0), reference=None)
    mri, ct = aims_of(batch)
    assert mri is batch.clean_mri and ct is batch.clean_ct
    mri, ct = aims_of(replace(batch, clean_mri=None, clean_ct=None))
    assert mri is batch.mri and ct is batch.ct


def write_pairs(folder, kind, shape):
    """Three patients of one slice: a disc inside a ring, of CT or in colour, beside an MRI."""
    h, w = np.mgrid[: shape[0], : shape[1]]
    names = {"ct_mri": "CT", "spect_mri": "SPECT"}
    for number, name in enumerate(("20001", "22001", "28001")):
        radius = np.hypot(h - shape[0] / 2, w - shape[1] / 2) / (0.4 * min(shape))
        ct = 80 * (radius < 0.8) + 250 * ((radius >= 0.8) & (radius < 1))
        mri = (150 + 20 * np.sin(h / 3 + number)) * (radius < 0.8)
        if kind == "spect_mri":
            ct = np.stack([ct, ct // 2, ct // 3], -1)
        for source, pixels in ((names[kind], ct), ("MRI", mri)):
            (folder / source).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / source / f"{name}.png")


def run(phantoms, folder, method, *overrides):
    quick = ("trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", "logger=csv")
    train(phantoms.config(f"method={method}", *overrides, *quick, folder=folder))
    losses = pd.read_csv(next(folder.rglob("metrics.csv")))["train/loss"].dropna()
    assert len(losses) >= 4 and np.isfinite(losses).all()
    started_at_zero = trained_method(folder).get_parameter(TRAINED[method])
    assert (started_at_zero != 0).any()


@pytest.mark.parametrize("method", TRAINED)
def test_it_trains_on_phantoms_and_is_restored_from_its_checkpoint(method, phantoms, tmp_path):
    quick = ("experiment=smoke", "data.prepare.workers=1", "trainer.log_every_n_steps=1")
    run(phantoms, tmp_path, method, *quick)
    rows = pd.read_csv(tmp_path / "cases.csv")
    assert rows[rows["metric"] == "psnr"]["value"].notna().any()


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("kind, mode", [("ct_mri", "L"), ("spect_mri", "RGB")])
def test_it_trains_on_odd_slices_and_fuses_them_in_their_colour(
    method, kind, mode, phantoms, tmp_path
):
    shape = (51, 45)
    write_pairs(tmp_path / "set", kind, shape)
    slices = (
        "data=paired_slices", f"data.root={tmp_path / 'set'}", f"data.kind={kind}",
        "data.splits={train:[20],val:[22],test:[28]}", "trainer.precision=32-true",
        "trainer.log_every_n_steps=1", "data.draws_per_epoch=3", "trainer.limit_val_batches=0",
    )  # fmt: skip
    run(phantoms, tmp_path / "run", method, *slices)
    picture = Image.open(tmp_path / "run" / "fused" / method / "28001.png")
    assert picture.size == shape[::-1] and picture.mode == mode
