from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.diffusion.schedule import cosine
from clinfuse.networks.fusion_unet import (
    DETAIL_GAIN,
    FusionUNet,
    crop,
    noise_angle,
    pad_to_multiple,
)

BATCH = 2
SHAPES = [(5, 7, 9), (8, 4, 12), (1, 3, 2), (13, 10), (1, 1)]
KINDS = {
    "haar": {},
    "pixel": {"haar": False},
    "cross_attention": {"cross_attention": True},
    "pixel_cross_attention": {"haar": False, "cross_attention": True},
    "bare": {"encoder_channels": 0},
}


def awake(network):
    """The network with random weights where MONAI starts from zero, so that what is inside shows.

    That is the last convolution of the network and of each residual block.
    """
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def unet(spatial_dims=3, state_channels=1, out_channels=1, **changes):
    settings = {"channels": (8, 16), "encoder_channels": 4} | changes
    return FusionUNet(spatial_dims, state_channels, out_channels, **settings)


def sources(shape, batch=BATCH):
    mri, ct = torch.rand(2, batch, 1, *shape) * 2 - 1
    roi = (torch.rand(batch, 3, *shape) > 0.5).float()
    return mri, ct, roi


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_size_comes_back_as_it_went_in(shape, kind):
    network = awake(unet(len(shape), state_channels=2, out_channels=3, **KINDS[kind]))
    state = torch.randn(BATCH, 2, *shape)
    out = network(state, network.encode(*sources(shape)), torch.tensor([0.3, 0.9]))
    assert out.shape == (BATCH, 3, *shape)
    assert out.isfinite().all()
    assert out.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_network_returns_zeros_and_can_still_learn(kind):
    network = unet(**KINDS[kind])
    out = network(torch.randn(BATCH, 1, 5, 7, 9), network.encode(*sources((5, 7, 9))))
    assert (out == 0).all()
    (out - 1).square().mean().backward()
    assert network.unet.out[-1].conv.weight.grad.abs().sum() > 0
    assert network.past.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("haar", [True, False])
def test_what_is_known_beforehand_is_read_and_led_past_the_unet(haar):
    network = unet(known_channels=2, haar=haar)
    parts, known = sources((5, 7, 9)), torch.randn(BATCH, 2, 5, 7, 9)
    assert not network(torch.randn(BATCH, 1, 5, 7, 9), network.encode(*parts, known)).any()
    awake(network)
    state = torch.randn(BATCH, 1, 5, 7, 9)
    with torch.no_grad():
        one, other = (network(state, network.encode(*parts, k)) for k in (known, -known))
    assert (one - other).abs().max() > 1e-4


def test_known_volumes_come_in_with_their_bands_level():
    """White noise has every band of one size: details come in raised, the approximation lowered."""
    mri, ct, roi = sources((8, 16, 16))
    noise = torch.randn_like(mri)
    bands = unet(encoder_channels=0).features(noise, ct, roi)[:, :8]
    assert bands[:, 0].std() == pytest.approx(8**-0.5, rel=0.1)
    assert bands[:, 1:].std() == pytest.approx(DETAIL_GAIN, rel=0.1)
    flat = unet(encoder_channels=0).features(torch.full_like(mri, 0.7), ct, roi)[:, :8]
    torch.testing.assert_close(flat[:, 0], torch.full_like(flat[:, 0], 0.7))
    torch.testing.assert_close(flat[:, 1:], torch.zeros_like(flat[:, 1:]))


@pytest.mark.parametrize("kind", ["haar", "pixel", "cross_attention"])
@pytest.mark.parametrize("shape", [(5, 7, 9), (9, 13)], ids=str)
def test_gradients_reach_both_encoders(shape, kind):
    network = awake(unet(len(shape), **KINDS[kind]))
    network(torch.randn(BATCH, 1, *shape), network.encode(*sources(shape))).sum().backward()
    for encoder in (network.encode_mri, network.encode_ct):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


def test_the_output_depends_on_state_level_both_sources_and_every_mask():
    network = awake(unet())
    shape = (4, 8, 8)
    state, alpha_bar_t = torch.randn(BATCH, 1, *shape), torch.full((BATCH,), 0.5)
    mri, ct, roi = sources(shape)

    def out(state=state, mri=mri, ct=ct, roi=roi, alpha_bar_t=alpha_bar_t):
        with torch.no_grad():
            return network(state, network.encode(mri, ct, roi), alpha_bar_t)

    other_masks = [
        torch.cat([roi[:, :i], 1 - roi[:, i : i + 1], roi[:, i + 1 :]], 1) for i in (0, 1, 2)
    ]
    changed = [
        out(state=-state), out(mri=-mri), out(ct=-ct), out(alpha_bar_t=0.9 * alpha_bar_t),
        *(out(roi=other) for other in other_masks),
    ]  # fmt: skip
    for other in changed:
        assert (other - out()).abs().max() > 1e-4


def test_a_network_without_state_takes_none_and_reads_a_clean_level():
    network = awake(unet(state_channels=0))
    condition = network.encode(*sources((4, 8, 8)))
    with torch.no_grad():
        out = network(None, condition)
        torch.testing.assert_close(out, network(None, condition, torch.ones(BATCH)))
        assert not torch.allclose(out, network(None, condition, torch.full((BATCH,), 0.1)))


@pytest.mark.parametrize("kind", ["haar", "cross_attention"])
def test_the_condition_of_a_study_serves_all_members_of_its_ensemble(kind):
    network = awake(unet(**KINDS[kind]))
    parts = sources((5, 6, 7))
    state = torch.randn(BATCH * 3, 1, 5, 6, 7)
    with torch.no_grad():
        once = network.encode(*parts)
        each = network.encode(*(part.repeat_interleave(3, 0) for part in parts))
        torch.testing.assert_close(network(state, once), network(state, each))
    assert once.shape == each.shape == (5, 6, 7)


def test_cross_attention_gets_a_token_of_both_encoders_for_every_deepest_voxel():
    network = unet(channels=(8, 8, 16), cross_attention=True)
    condition = network.encode(*sources((9, 16, 20)))  # padded to 16 16 24, in Haar space halved
    assert condition.context.shape == (BATCH, (8 // 4) * (8 // 4) * (12 // 4), 2 * 4)
    assert unet().encode(*sources((4, 4, 4))).context is None


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"cross_attention": True, "encoder_channels": 0}, "encoder_channels is 0"),
        ({"spatial_dims": 4}, "spatial_dims 2 or 3, got 4"),
    ],
)
def test_impossible_networks_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        unet(**wrong)


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    multiple=st.sampled_from([1, 2, 4, 8]),
)
def test_padding_repeats_the_border_to_the_next_multiple_and_cropping_undoes_it(shape, multiple):
    volume = torch.randn(2, 1, *shape)
    padded = pad_to_multiple(volume, multiple)
    assert all(
        n % multiple == 0 and n - m < multiple for n, m in zip(padded.shape[2:], shape, strict=True)
    )
    sides = [(0, n - m) for n, m in zip(padded.shape, volume.shape, strict=True)]
    np.testing.assert_array_equal(padded, np.pad(volume.numpy(), sides, mode="edge"))
    assert torch.equal(crop(padded, shape), volume)


@given(levels=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20, unique=True))
def test_the_noise_angle_never_falls_with_noise(levels):
    angles = noise_angle(torch.tensor(sorted(levels, reverse=True)))
    assert (angles.diff() >= 0).all()
    assert angles.min() >= 0 and angles.max() <= 1000.01


def test_the_noise_angle_is_0_for_clean_1000_for_noise_and_about_t_under_the_cosine_schedule():
    torch.testing.assert_close(
        noise_angle(torch.tensor([1.0, 0.5, 0.0])), torch.tensor([0.0, 500, 1000])
    )
    t = torch.arange(1, 1001)
    # the schedule's offset of 0.008 shifts t by 8 of 1000 at the clean end, and by none at the end
    assert (noise_angle(cosine(1000)) - t).abs().max() < 10


def test_one_part_of_the_network_is_shared_by_every_ensemble_size():
    network = awake(unet())
    encode = partial(network.encode, *sources((4, 6, 8), batch=1))
    state = torch.randn(1, 1, 4, 6, 8).expand(4, 1, 4, 6, 8)
    with torch.no_grad():
        members = network(state, encode(), torch.full((4,), 0.5))
        alone = network(state[:1], encode(), torch.full((1,), 0.5))
    torch.testing.assert_close(members, alone.expand_as(members), atol=1e-5, rtol=1e-4)


def test_no_convolution_is_left_that_bfloat16_would_train_wrongly_on_a_few_slices():
    network = unet(known_channels=2)
    assert all(type(module) is not torch.nn.Conv3d for module in network.modules())
    state, parts, known = (
        torch.randn(1, 1, 3, 12, 12),
        sources((3, 12, 12), 1),
        torch.randn(1, 2, 3, 12, 12),
    )

    def gradient(autocast):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = awake(network)(state, network.encode(*parts, known))
        out.float().square().mean().backward()
        return network.encode_mri[0].weight.grad.clone()

    exact, half = gradient(False), gradient(True)
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()
