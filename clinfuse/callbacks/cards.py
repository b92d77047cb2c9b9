"""The cards of a training run, when its test has ended."""

import inspect
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from clinfuse.reporting.card import write_model_card, write_run_card


class RunCards(Callback):
    """Writes ``model_card.md`` and ``run_card.md`` from what the recorder before it has written.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            trainer.is_global_zero and (self.folder / "cases.csv").is_file()
        ):  # a lesion head fuses nothing
            write_model_card(self.folder, about(pl_module))
            write_run_card(self.folder)


def about(method: LightningModule) -> str:
    """What a method is: the first sentence of its docstring."""
    return (inspect.getdoc(type(method)) or "").split("\n\n")[0].replace("\n", " ")
