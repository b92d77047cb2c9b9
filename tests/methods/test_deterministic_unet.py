import torch

from clinfuse.losses.fidelity_of_gradients import SourceFidelity
from clinfuse.methods.objective import clean_roi_loss


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_it_is_the_denoisers_network_but_for_the_state_it_does_not_have(phantoms):
    regression = phantoms.method("deterministic_unet").network
    denoiser = phantoms.method("clinfuse").network
    first = denoiser.unet.conv_in.conv
    # x_t, mu and log s in eight Haar bands each, seen by 3 x 3 x 3 voxels of every feature, and
    # mu and log s led past the U-Net to the eight bands of the output
    assert count(denoiser) - count(regression) == 3 * 8 * 27 * first.out_channels + 2 * 8 * 8
    assert regression.state_channels == 0 and denoiser.state_channels == 1
    assert regression.known_channels == 0 and denoiser.known_channels == 2


def test_its_loss_is_the_objective_that_every_trained_method_minimises(phantoms):
    method, batch = phantoms.method("deterministic_unet", "objective.roi=0.5"), phantoms.batch(4.0)
    with torch.no_grad():
        method.network.unet.out[-1].conv.bias[0] = 0.3
        fused = method._regress(batch)
        error = method.reference_loss(fused, batch.reference, batch.spacing_mm)
        expected = error + 0.5 * clean_roi_loss(method.loss, fused, batch)
        method.log_dict = lambda *_, **__: None  # there is no trainer to log to
        torch.testing.assert_close(method.training_step(batch, 0), expected.mean())


def test_fusing_stays_in_model_space_while_training_sees_beyond(phantoms):
    method, batch = phantoms.method("deterministic_unet"), phantoms.batch()
    with torch.no_grad():
        method.network.unet.out[-1].conv.bias[0] = 10.0
        assert method._regress(batch).max() > 1
        assert method.fuse(batch).max() == 1


def test_a_few_steps_on_one_case_lower_its_loss(phantoms):
    method, batch = phantoms.method("deterministic_unet"), phantoms.batch(2.0)
    method.log_dict = lambda *_, **__: None
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = method.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_what_is_lost_of_the_clean_sources_counts_where_it_is_weighed(phantoms):
    batch = phantoms.batch(4.0)

    def loss(weight):
        asked = (f"objective.kept={weight}", "objective.information=0.0")
        method = phantoms.method("deterministic_unet", *asked)
        method.log_dict = lambda *_, **__: None  # there is no trainer to log to
        with torch.no_grad():
            return method.training_step(batch, 0), method._regress(batch)

    (without, fused), (weighed, _) = loss(0.0), loss(2.0)
    lost = SourceFidelity(1.0, 0.0)(fused, batch.clean_mri, batch.clean_ct).mean()
    torch.testing.assert_close(weighed, without + 2 * lost)
