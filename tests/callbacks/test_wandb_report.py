import importlib.util

import pytest

from clinfuse.callbacks.wandb_report import publish_report, sweep_report


def test_a_report_has_the_tables_then_curves_scores_and_pictures_of_the_sweeps_runs():
    report = sweep_report("someone", "clinfuse", "steps", "Sweep steps", "| steps | bone |")
    text, grid = report.blocks
    assert text.text == "| steps | bone |"
    (runs,) = grid.runsets
    assert (runs.entity, runs.project) == ("someone", "clinfuse") and "steps" in str(runs.filters)
    kinds = [type(panel).__name__ for panel in grid.panels]
    assert kinds == ["LinePlot", "BarPlot", "BarPlot", "BarPlot", "MediaBrowser"]
    assert len(sweep_report("someone", "clinfuse", "steps", "Sweep steps").blocks) == 1


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"clinfuse\[report\]"):
        sweep_report("someone", "clinfuse", "steps", "Sweep steps")


def test_without_a_key_nothing_is_tried(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert publish_report("clinfuse", "steps", tmp_path) is None


@pytest.mark.slow
def test_a_service_that_cannot_be_reached_is_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "table.md").write_text("| |")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert publish_report("clinfuse", "steps", tmp_path) is None
    (warning,) = [r for r in caplog.records if r.name.startswith("clinfuse")]
    assert "no report on W&B" in warning.getMessage()
