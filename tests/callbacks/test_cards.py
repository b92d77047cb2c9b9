import lightning
import pytest

from clinfuse.callbacks.cards import RunCards, about
from clinfuse.methods.rules import Weighted
from clinfuse.reporting.rows import case_rows, write_rows


class Short(lightning.LightningModule):
    """Fuses in one
    sentence.

    And this is for those who read on.
    """


def test_what_a_method_is_its_docstring_begins_with():
    assert about(Short()) == "Fuses in one sentence."


def test_cards_are_written_of_what_was_scored_and_of_nothing_else(tmp_path):
    trainer, cards = lightning.Trainer(logger=False, accelerator="cpu"), RunCards(tmp_path)
    cards.on_test_end(trainer, Weighted(0.5))  # as after a lesion head's test
    assert not list(tmp_path.iterdir())
    write_rows(
        tmp_path / "cases.csv",
        case_rows(
            [("bone", "psnr", 20.0)], case_id="a", method="average", preset="stroke", seed=0,
            misregistration_mm=0.0, mask_source="expert", steps=0,
        ),
    )  # fmt: skip
    cards.on_test_end(trainer, Weighted(0.5))
    assert {"model_card.md", "run_card.md"} <= {path.name for path in tmp_path.iterdir()}
    assert about(Weighted(0.5)) in (tmp_path / "model_card.md").read_text("utf-8")
    assert about(Weighted(0.5)) == "F = w I_M + (1 - w) I_C."


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
