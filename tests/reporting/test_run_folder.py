import pandas as pd
import pytest

from clinfuse.reporting.rows import case_rows, read_rows, write_rows
from clinfuse.reporting.run_folder import RunFolder


def row(**more):
    key = {"case_id": "a", "method": "ours", "preset": "default", "seed": 0}
    key |= {"misregistration_mm": 0.0, "mask_source": "expert", "steps": 0} | more
    return case_rows([("bone", "psnr", 20.0)], **key)


def test_a_setting_is_looked_up_where_it_refers_to():
    config = {
        "seed": 3, "data": {"seed": "${seed}", "jitter": {"max_mm": 4.0}, "root": "${dir:x}/a"},
        "loop": "${loop}",
    }  # fmt: skip
    run = RunFolder("a", pd.DataFrame(row()), config=config)
    assert run.setting("data.jitter.max_mm") == 4.0
    assert run.setting("data.seed") == 3
    for unknown in ("data.root", "data.jitter.max_mm.more", "nowhere", "loop"):
        assert run.setting(unknown) is None


def test_scores_of_perturbed_cases_are_left_out(tmp_path):
    noisy = row(perturbation="mri_noise", amount=0.2)
    write_rows(tmp_path / "cases.csv", [*row(), *noisy])
    assert len(read_rows(tmp_path / "cases.csv")) == 2
    assert RunFolder.read(tmp_path).rows["perturbation"].tolist() == [""]


@pytest.mark.parametrize("name", ["facts.json", ".hydra/config.yaml"])
def test_a_record_that_cannot_be_read_is_named(name, tmp_path):
    write_rows(tmp_path / "cases.csv", row())
    (tmp_path / ".hydra").mkdir()
    (tmp_path / name).write_text("{no: [record")
    with pytest.raises(ValueError, match=f"expected a record of a run.*{name}"):
        RunFolder.read(tmp_path)
