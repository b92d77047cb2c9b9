import functools
import hashlib
import logging
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from clinfuse.losses.perceptual import perceptual_distance
from clinfuse.types import SliceBatch

SMALL = (
    "resnet_width=4", "method.network.encoder.layers=[1,1,1,1]",
    "+method.network.widths=[4,4,8,8,12,12]",
)  # fmt: skip
"""A bottleneck a stage, a sixteenth as wide as ResNet-50's."""


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


def fitted(method, data, epochs=1, ckpt_path=None):
    """Trained for two steps an epoch, the weights averaged as in every run."""
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, limit_train_batches=2, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=EMAWeightAveraging(decay=0.9),
    )  # fmt: skip
    trainer.fit(method, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def resnet_file(path, method):
    """Weights in torchvision's layout for the ResNet of a method, its classifier included."""
    resnet = method.network.encoder.resnet
    weights = {
        name: torch.rand_like(w) for name, w in resnet.state_dict().items() if w.is_floating_point()
    }
    torch.save(weights | {"fc.weight": torch.rand(5, 128), "fc.bias": torch.rand(5)}, path)
    return weights


def assert_loaded(method, weights):
    for name, loaded in method.network.encoder.resnet.state_dict().items():
        if loaded.is_floating_point():
            torch.testing.assert_close(loaded, weights[name])  # averaging a constant rounds


def test_it_is_configured_as_the_method_describes_it(phantoms):
    method = phantoms.config("method=resnet_fusion").method
    encoder = method.network.encoder
    assert (encoder.block, list(encoder.layers), encoder.width) == ("bottleneck", [3, 4, 6, 3], 64)
    assert (method.loss.ssim, method.loss.gradient, method.perceptual) == (1.0, 0.5, 0.1)
    assert (method.optimizer._target_, method.optimizer.lr) == ("torch.optim.Adam", 2e-4)
    assert method.layer_decay < 1


@pytest.mark.parametrize("shape", [(24, 32), (13, 19)], ids=str)
def test_on_slices_of_any_size_it_starts_as_the_average_and_learns_to_be_better(shape, phantoms):
    method = unlogged(phantoms.method("resnet_fusion", "spatial_dims=2", *SMALL))
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
    assert losses[-1] < 0.95 * losses[0]  # the sources differ, so no image costs nothing
    fused = method.fuse(batch)
    assert fused.shape == batch.mri.shape and fused.abs().max() <= 1


def test_its_loss_is_ssim_half_the_gradient_and_a_tenth_of_the_perceptual_distance(phantoms):
    method, batch = unlogged(phantoms.method("resnet_fusion", *SMALL)), phantoms.batch()
    reference = batch.reference
    fused = method.fuse(batch)
    terms = method.loss(fused, reference, reference, batch.spacing_mm)
    seen, aim = (method.network.encoder(image, 3) for image in (fused, reference))
    expected = terms.ssim + 0.5 * terms.gradient + 0.1 * perceptual_distance(seen, aim, aim)
    torch.testing.assert_close(method.training_step(batch, 0), expected.mean())
    pair = replace(batch, reference=None)
    terms = method.loss(fused, batch.clean_mri, batch.clean_ct, batch.spacing_mm)
    sources = [method.network.encoder(s, 3) for s in (batch.clean_mri, batch.clean_ct)]
    expected = terms.ssim + 0.5 * terms.gradient + 0.1 * perceptual_distance(seen, *sources)
    torch.testing.assert_close(method.training_step(pair, 0), expected.mean())


def test_training_moves_everything_but_the_encoder_the_slower_the_farther_from_f(phantoms, caplog):
    method = phantoms.method("resnet_fusion", *SMALL, "method.layer_decay=0.5")
    before = {name: weight.clone() for name, weight in method.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        trainer = fitted(method, phantoms.data(), epochs=2)
    assert "no weights given for the ResNet: its frozen features are random" in caplog.text
    after = method.state_dict()
    moved = {name for name in before if not torch.allclose(before[name], after[name], rtol=1e-6)}
    frozen = {name for name in before if name.startswith("network.encoder.")}
    assert not moved & frozen and "network.blend.read.weight" in moved
    assert any(name.startswith("network.fusion.4") for name in moved)
    factors = trainer.lr_scheduler_configs[0].scheduler.lr_lambdas
    rates = [factor(0) for factor in factors]
    assert [rate / rates[0] for rate in rates] == pytest.approx([0.5**depth for depth in range(7)])


def test_weights_from_a_file_are_in_the_encoder_once_training_has_started(phantoms, tmp_path):
    asked = (*SMALL, f"method.weights={tmp_path / 'resnet50.pth'}")
    method = phantoms.method("resnet_fusion", "spatial_dims=3", *asked)
    weights = resnet_file(tmp_path / "resnet50.pth", method)
    trainer = fitted(method, phantoms.data())
    assert_loaded(method, weights)

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "resnet50.pth").unlink()  # what a checkpoint has, nobody asks for again
    resumed = phantoms.method("resnet_fusion", "spatial_dims=3", *asked)
    fitted(resumed, phantoms.data(), epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert_loaded(resumed, weights)


def test_weights_from_a_url_are_fetched_once_and_checked(phantoms, tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    weights = resnet_file(served / "resnet.pth", phantoms.method("resnet_fusion", *SMALL))
    sha256 = hashlib.sha256((served / "resnet.pth").read_bytes()).hexdigest()
    handler_class = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(handler_class, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/resnet.pth"
        asked = [
            *SMALL, "+weights=resnet50_imagenet", f"method.weights.url={url}",
            f"method.weights.to._args_=[{tmp_path / 'cache' / 'resnet.pth'}]",
        ]  # fmt: skip
        wrong = phantoms.method("resnet_fusion", *asked, f"method.weights.sha256={'0' * 64}")
        with pytest.raises(ValueError, match=f"expected sha256 {'0' * 64}, got {sha256}"):
            wrong.start_training()
        method = phantoms.method("resnet_fusion", *asked, f"method.weights.sha256={sha256}")
        assert not (tmp_path / "cache" / "resnet.pth").exists()  # not before it is needed
        method.start_training()
        server.shutdown()
    assert_loaded(method, weights)
    again = phantoms.method("resnet_fusion", *asked, f"method.weights.sha256={sha256}")
    again.start_training()  # from what was kept: nobody serves any more


@pytest.mark.parametrize(
    ("write", "error", "said"),
    [
        (lambda path: None, FileNotFoundError, "expected a file of weights, found no file at"),
        (lambda path: path.write_bytes(b"nothing"), ValueError, "expected readable weights, got"),
        (
            lambda path: torch.save({"conv1.weight": torch.zeros(4, 3, 7, 7)}, path),
            ValueError,
            r"expected weights of a 3-D ResNet of bottleneck blocks \[1, 1, 1, 1\].* got no bn1",
        ),
    ],
    ids=["missing", "unreadable", "another"],
)
def test_weights_that_cannot_be_used_stop_the_training(write, error, said, phantoms, tmp_path):
    write(tmp_path / "weights.pth")
    asked = f"method.weights={tmp_path / 'weights.pth'}"
    method = phantoms.method("resnet_fusion", *SMALL, asked)
    with pytest.raises(error, match=f"{said}.*weights.pth"):
        method.start_training()


def test_a_decay_that_would_stop_or_reverse_learning_is_refused(phantoms):
    with pytest.raises(Exception, match=r"expected layer_decay in \(0, 1\], got -0.5"):
        phantoms.method("resnet_fusion", *SMALL, "method.layer_decay=-0.5")
