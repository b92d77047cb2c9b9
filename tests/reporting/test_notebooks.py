import sys
from pathlib import Path

import pytest

from clinfuse.reporting import notebooks
from clinfuse.reporting.notebooks import run_command, start, trained_run, viewer


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    monkeypatch.setenv(notebooks.SCALE, "ci")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_command_says_what_it_is_and_what_it_puts_out(somewhere, capfd):
    (somewhere / "greeting.py").write_text("import sys; print('\\x1b[1mhello', sys.argv[1:])")
    run_command("greeting", "a=[1, 2]")
    assert capfd.readouterr().out == "$ python -m greeting 'a=[1, 2]'\nhello ['a=[1, 2]']\n"


def test_progress_is_written_over_itself(somewhere, capfd):
    (somewhere / "slow.py").write_text("print('Step 1 2.1it/s')\nprint('Step 2 2.0it/s\\ndone')")
    run_command("slow")
    assert capfd.readouterr().out.endswith("Step 1 2.1it/s\rStep 2 2.0it/s\rdone\n")


def test_a_command_that_fails_stops_the_notebook(somewhere):
    (somewhere / "broken.py").write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended with 3: python -m broken"):
        run_command("broken")


@pytest.mark.parametrize(("inside", "scale"), [("notebooks", "ci"), ("", "ci"), ("notebooks", "")])
def test_all_notebooks_work_in_one_place(inside, scale, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / inside)
    monkeypatch.setenv(notebooks.SCALE, scale)
    runs = start()
    assert Path.cwd() == tmp_path and start() == runs
    assert (tmp_path / runs).is_dir()
    assert runs == Path("runs/notebooks_ci" if scale else "runs/notebooks")


def test_a_run_that_is_there_is_not_trained_again(somewhere, monkeypatch):
    monkeypatch.setattr(notebooks, "run_command", lambda *words: pytest.fail(" ".join(words)))
    (start() / "run").mkdir()
    (start() / "run" / "calibration.json").touch()
    assert trained_run() == start() / "run"


def test_a_view_needs_its_files(somewhere):
    with pytest.raises(FileNotFoundError, match=r"found none at mri\.nii\.gz"):
        viewer([{"path": "mri.nii.gz"}])


def test_a_view_without_its_package_says_what_to_install(somewhere, monkeypatch, capsys):
    (somewhere / "mri.nii.gz").touch()
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    assert viewer([{"path": "mri.nii.gz"}]) is None
    assert "clinfuse[notebooks]" in capsys.readouterr().out


def test_a_view_shows_left_and_right_as_the_pictures_do(somewhere, phantoms):
    folder = phantoms.root / "case_000"
    shown = viewer([{"path": folder / "mri.nii.gz", "colormap": "gray"}])
    assert shown.opts.is_radiological_convention
    assert [volume.path for volume in shown.volumes] == [folder / "mri.nii.gz"]
