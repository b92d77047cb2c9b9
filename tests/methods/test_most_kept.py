import torch

from clinfuse.losses.fidelity_of_gradients import SourceFidelity
from clinfuse.losses.most_kept import MostKept
from clinfuse.methods.most_kept import MostKeptClimb


def test_more_of_the_pair_is_kept_than_by_its_maximum_and_little_slices_leave_vif_out(
    phantoms, caplog
):
    batch, lost = phantoms.batch(0.0), SourceFidelity(1.0, 0.0)
    fused = MostKeptClimb(MostKept(0.3, steps=20)).fuse(batch)
    brightest = torch.maximum(batch.mri, batch.ct)
    assert lost(fused, batch.mri, batch.ct) < lost(brightest, batch.mri, batch.ct) - 0.02
    assert "without VIF" in caplog.text
