import json
import logging
import math

import lightning
import pytest
import torch

from clinfuse.callbacks.calibration import FILE, CalibrationFit, read_calibration
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.rules import Weighted
from clinfuse.metrics.calibration import REGIONS


class Loud(FusionMethod):
    """A dim reference, further off in bone than elsewhere, with a spread of 0.05 everywhere."""

    def fuse(self, batch):
        return self.ensemble(batch).mean(0)

    def ensemble(self, batch):
        mean = 0.8 * batch.reference + torch.where(batch.truth()[2][:, 1:2], 0.1, 0.05)
        return torch.stack([mean - 0.05 / math.sqrt(2), mean + 0.05 / math.sqrt(2)])

    def registered_roi(self, batch):
        return batch.truth()[2]


def fit(method, folder, phantoms):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[CalibrationFit(folder)], enable_checkpointing=False,
    )  # fmt: skip
    data = phantoms.data()
    trainer.validate(method, datamodule=data, verbose=False)
    return data


def test_all_validation_cases_are_fitted_in_the_regions_where_the_method_places_them(
    phantoms, tmp_path
):
    data = fit(Loud(), tmp_path, phantoms)
    found = read_calibration(tmp_path, Loud())
    assert list(found.case_ids) == list(data.splits["val"])
    assert found.misregistration_mm == data.val_misregistration_mm
    data.setup("validate")
    errors = {"brain": [], "bone": []}
    for batch in data.val_dataloader():
        roi = batch.truth()[2]
        error = (Loud().fuse(batch) - batch.reference).abs()
        errors["brain"].append(error[roi[:, 0:1]])
        errors["bone"].append(error[roi[:, 1:2] & ~roi[:, 0:1]])
    for region, of_cases in errors.items():
        error = torch.cat(of_cases)
        rms = error.square().mean().sqrt().item()
        ((stated,), (size,)) = found.curve[region]  # one spread, one knot
        assert stated == pytest.approx(0.055, rel=1e-3)  # spread and floor
        assert size == pytest.approx(rms, rel=0.05)
        assert size * found.quantile[region] == pytest.approx(error.quantile(0.9).item(), rel=0.05)


def test_a_method_of_one_draw_has_nothing_to_calibrate(phantoms, tmp_path):
    fit(Weighted(0.5), tmp_path, phantoms)
    assert list(tmp_path.iterdir()) == [] and read_calibration(tmp_path, Weighted(0.5)) is None


OF_FACTORS = {"level": 0.9, "std_scale": {}, "quantile": {}, "temperature": None}
"""What a calibration said before it had curves."""


@pytest.mark.parametrize("content", ["{", json.dumps({"level": 0.9}), "[]", json.dumps(OF_FACTORS)])
def test_a_file_that_is_no_calibration_is_refused_by_name(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"expected a calibration, got .*calibration\.json"):
        read_calibration(tmp_path, Loud())


def test_a_calibration_of_how_a_method_sampled_before_is_left_out_and_said(
    phantoms, tmp_path, caplog
):
    fit(Loud(), tmp_path, phantoms)
    method = Loud()
    method.sampling_version = Loud.sampling_version + 1
    with caplog.at_level(logging.WARNING):
        assert read_calibration(tmp_path, method) is None
    assert f"resume={tmp_path} calibrates again" in caplog.text
    without = json.loads((tmp_path / FILE).read_text())
    del without["sampling_version"]  # as files had it before they said
    (tmp_path / FILE).write_text(json.dumps(without))
    assert read_calibration(tmp_path, Loud()) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("level", 2), ("level", "high"), ("temperature", -1), ("temperature", "warm"),
        ("misregistration_mm", None), ("quantile", {"brain": 1.0}), ("quantile", [1, 2]),
        ("curve", {}), ("curve", {"brain": [[1.0], [1.0]]}), ("curve", "steep"),
        *(("curve", dict.fromkeys(REGIONS, wrong)) for wrong in (
            [[1.0, 0.5], [1.0, 1.0]], [[0.0], [1.0]], [[1.0], ["x"]], [[], []], [1.0],
            [[1, 2], [3]], [[1.0], [float("nan")]], [[0.1], [1.0], [1.0]],
        )),
    ],
)  # fmt: skip
def test_a_calibration_of_something_else_than_numbers_is_refused(name, value, tmp_path):
    good = {
        "level": 0.9, "curve": {region: [[0.1, 0.5], [0.2, 0.4]] for region in REGIONS},
        "quantile": dict.fromkeys(REGIONS, 1.6), "temperature": None, "case_ids": ["a"],
        "misregistration_mm": 2.0,
    }  # fmt: skip
    (tmp_path / FILE).write_text(json.dumps(good))
    read_calibration(tmp_path, Loud())
    (tmp_path / FILE).write_text(json.dumps({**good, name: value}))
    with pytest.raises(ValueError, match=f"expected a calibration, got .*{tmp_path}"):
        read_calibration(tmp_path, Loud())
