"""One test case of a cohort under every condition, for workers that share the cases."""

from typing import Any

import lightning
from torch.utils.data import DataLoader, Subset


class OneCase(lightning.LightningDataModule):
    """What another DataModule tests, of one of its cases alone.

    Args:
        data: whose ``test_dataloader`` gives each condition's cases in the order of its split, one
            by one.
        case_id: one of them.
    """

    def __init__(self, data: Any, case_id: str) -> None:
        super().__init__()
        self.data, self.index = data, data.splits["test"].index(case_id)
        self.splits = {"test": [case_id]}
        self.conditions, self.patients = data.conditions, data.patients
        self.misregistration_mm = data.misregistration_mm

    def test_dataloader(self) -> list[DataLoader]:
        return [
            DataLoader(
                Subset(loader.dataset, [self.index]), batch_size=1, collate_fn=loader.collate_fn
            )
            for loader in self.data.test_dataloader()
        ]
