import logging
from dataclasses import replace

import lightning
import pytest
import torch

from clinfuse.methods.aims import aims_of
from clinfuse.types import SliceBatch

SMALL = (
    "resnet_width=4", "method.network.encoder.layers=[1,1,1,1]",
    "+method.network.widths=[4,4,8,8,12,12]",
)  # fmt: skip
"""A block a stage, a sixteenth as wide as ResNet-34's."""


def slices(*shape):
    """Pairs with bright shapes of their own in each source, the second in colour."""
    mri, ct = torch.full((2, 1, 1, *shape), -1.0).unbind(0)
    mri[..., 2:-3, 3:-2] = torch.linspace(-0.8, 0.6, shape[1] - 5)
    ct[..., 4:7, :] = 0.8
    return SliceBatch(
        mri=mri,
        ct=ct,
        roi=torch.zeros(1, 3, *shape, dtype=torch.bool),
        spacing_mm=torch.ones(1, 2),
        case_id=["pair"],
        chroma=0.1 * torch.ones(1, 2, *shape),
    )


def unlogged(method):
    method.log_dict = lambda *_, **__: None  # there is no trainer to log to
    return method


class EncodersByEpoch(lightning.Callback):
    """The encoders' weights at the end of every epoch, the first before all."""

    def __init__(self):
        self.seen = []

    def keep(self, trainer, method):
        encoders = method.network.encoders
        self.seen.append([p.detach().clone() for e in encoders for p in e.parameters()])

    on_train_start = on_train_epoch_end = keep


def fitted(method, data, epochs=1, callbacks=None, ckpt_path=None):
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, limit_train_batches=2, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(method, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def run_of(trainer, folder):
    """The folder of a run, as far as another training needs it."""
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


def test_both_phases_are_configured_as_the_method_describes_them(phantoms):
    first, second = (
        phantoms.config(f"experiment=transfer_{phase}") for phase in ("visible_infrared", "medical")
    )
    for cfg in (first, second):
        encoder = cfg.method.network.encoder
        assert (encoder.block, list(encoder.layers), encoder.width) == ("basic", [3, 4, 6, 3], 64)
        assert {name: weight for name, weight in cfg.method.loss.items() if name != "_target_"} == {
            "content": 15, "structure": 8, "detail": 5, "consistency": 3, "gradient": 2,
            "medical": 10,
        }  # fmt: skip
    assert (first.data.kind, first.data.batch_size, first.trainer.max_epochs) == ("vis_ir", 8, 50)
    assert (first.method.optimizer.lr, first.method.freeze_epochs) == (1e-4, 0)
    assert (second.data.batch_size, second.trainer.max_epochs) == (4, 20)
    assert (second.method.optimizer.lr, second.method.freeze_epochs) == (1e-5, 5)


@pytest.mark.parametrize("shape", [(24, 32), (13, 19)], ids=str)
def test_on_slices_of_any_size_it_starts_as_the_average_and_learns_to_be_better(shape, phantoms):
    method = unlogged(phantoms.method("transfer_fusion", "spatial_dims=2", *SMALL))
    batch = slices(*shape)
    torch.testing.assert_close(method.fuse(batch), (batch.mri + batch.ct) / 2)
    optimizer = torch.optim.Adam(method.network.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = method.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    fused = method.fuse(batch)
    assert fused.shape == batch.mri.shape and fused.abs().max() <= 1


def test_its_loss_aims_at_the_reference_or_the_clean_pair_and_sees_the_true_masks(phantoms):
    method, batch = unlogged(phantoms.method("transfer_fusion", *SMALL)), phantoms.batch(2.0)
    for case in (batch, replace(batch, reference=None)):
        truth = (batch.clean_mri, batch.clean_ct, batch.clean_roi)
        expected = method.loss(method.fuse(case), aims_of(case), truth, batch.spacing_mm).total
        torch.testing.assert_close(method.training_step(case, 0), expected.mean())


def test_the_ct_is_shown_in_windows_of_hounsfield_units_where_it_has_them(phantoms):
    method, batch = phantoms.method("transfer_fusion", *SMALL), phantoms.batch(0.0)
    torch.nn.init.normal_(method.network.blend.read.weight)
    assert batch.ct_map == ["piecewise"]
    as_8_bit = method.fuse(replace(batch, ct_map=["window_8bit"]))
    assert not torch.equal(method.fuse(batch), as_8_bit)
    assert torch.equal(method.fuse(replace(batch, ct_map=[])), as_8_bit)


def test_encoders_stay_as_they_are_while_frozen_and_then_learn(phantoms, caplog):
    method = phantoms.method("transfer_fusion", *SMALL, "method.freeze_epochs=2")
    watch, before = EncodersByEpoch(), method.network.blend.read.weight.clone()
    with caplog.at_level(logging.WARNING):
        fitted(method, phantoms.data(), epochs=4, callbacks=[watch])
    assert "both ResNets start at random" in caplog.text
    assert not torch.equal(method.network.blend.read.weight, before)
    moved = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in zip(watch.seen, watch.seen[1:], strict=False)
    ]
    assert moved == [False, False, True, True]


def test_a_second_phase_starts_where_the_first_has_ended_and_needs_it_no_more(phantoms, tmp_path):
    first = phantoms.method("transfer_fusion", *SMALL)
    run = run_of(fitted(first, phantoms.data()), tmp_path / "phase_1")
    frozen = (*SMALL, f"method.start={run}", "method.freeze_epochs=9")
    second, watch = phantoms.method("transfer_fusion", *frozen), EncodersByEpoch()
    trainer = fitted(second, phantoms.data(), callbacks=[watch])
    ended = [p for e in first.network.encoders for p in e.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(watch.seen[0], ended, strict=True))

    last = run_of(trainer, tmp_path / "phase_2") / "checkpoints" / "last.ckpt"
    (run / "checkpoints" / "last.ckpt").unlink()
    resumed = phantoms.method("transfer_fusion", *frozen)
    fitted(resumed, phantoms.data(), epochs=2, ckpt_path=last)
    with pytest.raises(
        FileNotFoundError, match=r"expected a trained run with .* none in .*phase_1"
    ):
        phantoms.method("transfer_fusion", *frozen).start_training()


def test_both_encoders_start_from_one_file_the_mri_s_stem_averaged(phantoms, tmp_path):
    path = tmp_path / "resnet34.pth"
    asked = ("spatial_dims=2", *SMALL, f"method.weights={path}")
    method = phantoms.method("transfer_fusion", *asked)
    of_ct = method.network.encode_ct.resnet.state_dict()
    weights = {n: torch.rand_like(w) for n, w in of_ct.items() if w.is_floating_point()}
    torch.save(weights | {"fc.weight": torch.rand(5, 32), "fc.bias": torch.rand(5)}, path)
    method.start_training()
    encoders = method.network.encode_mri.resnet, method.network.encode_ct.resnet
    stem = weights["conv1.weight"]
    torch.testing.assert_close(encoders[0].conv1.weight, stem.mean(1, keepdim=True))
    assert torch.equal(encoders[1].conv1.weight, stem)
    for resnet in encoders:
        assert torch.equal(resnet.layer4[0].conv2.weight, weights["layer4.0.conv2.weight"])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(b"nothing"), "expected readable weights, got"),
        (
            lambda path: torch.save({"state_dict": {"network.past.weight": torch.zeros(1)}}, path),
            "expected weights of a run of this method and this size, got no network.encode_mri",
        ),
    ],
    ids=["unreadable", "another method"],
)
def test_a_run_that_cannot_be_started_from_stops_the_training(write, said, phantoms, tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    write(path)
    method = phantoms.method("transfer_fusion", *SMALL, f"method.start={tmp_path}")
    with pytest.raises(ValueError, match=f"{said}.*last.ckpt"):
        method.start_training()


def test_weights_and_a_run_to_start_from_are_one_too_many(phantoms):
    with pytest.raises(Exception, match=r"expected weights .* or a run to start from, got both: b"):
        phantoms.method("transfer_fusion", *SMALL, "method.weights=a", "method.start=b")
