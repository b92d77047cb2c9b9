import subprocess

import pandas as pd
import pytest

from clinfuse.reporting.rows import case_rows, read_rows, write_rows
from clinfuse.reporting.run_folder import CONFIG, DIGEST, RunFolder, check_config, write_config


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


def test_a_configuration_is_kept_with_what_sha256sum_says_of_it(tmp_path):
    write_config(tmp_path, "a: ü\n")
    asked = ["sha256sum", "-c", DIGEST.name]
    said = subprocess.run(asked, cwd=(tmp_path / DIGEST).parent, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout == "config.yaml: OK\n"
    write_config(tmp_path, "b: 1\n")
    check_config(tmp_path)
    assert sorted(p.name for p in (tmp_path / ".hydra").iterdir()) == [DIGEST.name, CONFIG.name]


def test_any_bit_of_a_configuration_that_is_another_is_noticed_until_its_sum_is_removed(tmp_path):
    write_rows(tmp_path / "cases.csv", row())
    text = b"method: {steps: 4}\n"  # 5 is one bit away
    write_config(tmp_path, text.decode())
    for place in range(len(text)):
        for bit in range(8):
            flipped = bytes(b ^ (1 << bit) * (i == place) for i, b in enumerate(text))
            (tmp_path / CONFIG).write_bytes(flipped)
            with pytest.raises(ValueError, match=f"damaged or edited since: {tmp_path / CONFIG}"):
                check_config(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.replace(b"4", b"5"))
    with pytest.raises(ValueError, match=r"on purpose, remove config\.sha256 beside it"):
        RunFolder.read(tmp_path)
    (tmp_path / DIGEST).unlink()
    assert RunFolder.read(tmp_path).setting("method.steps") == 5


@pytest.mark.parametrize("written", [b"", b"0" * 64, b"\xff" * 80])
def test_a_sum_that_is_damaged_itself_is_no_reason_to_trust(written, tmp_path):
    write_config(tmp_path, "a: 1\n")
    (tmp_path / DIGEST).write_bytes(written)
    with pytest.raises(ValueError, match="expected the configuration that the run has written"):
        check_config(tmp_path)
