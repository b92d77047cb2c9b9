import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.schedulers import DDPMScheduler

from clinfuse.diffusion.schedule import (
    Schedule,
    cosine,
    levels_for,
    linear,
    walk,
    zero_terminal_snr,
)


@pytest.mark.parametrize("n", [10, 1000])
@pytest.mark.parametrize(("ours", "theirs"), [(cosine, "cosine"), (linear, "linear_beta")])
def test_schedules_agree_with_monai(n, ours, theirs):
    expected = DDPMScheduler(num_train_timesteps=n, schedule=theirs).alphas_cumprod
    # MONAI multiplies n factors in float32, each rounded to 6e-8.
    torch.testing.assert_close(ours(n), expected, rtol=n * 6e-8 + 1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", [cosine, linear])
def test_levels_fall_from_nearly_clean_to_nearly_noise(schedule):
    alpha_bars = schedule(1000)
    assert (alpha_bars.diff() < 0).all()
    assert 0.999 < alpha_bars[0] < 1
    assert 0 < alpha_bars[-1] < 1e-4


@pytest.mark.parametrize("schedule", [cosine, linear])
def test_zero_terminal_snr_ends_at_zero_and_keeps_its_cleanest_level(schedule):
    alpha_bars = zero_terminal_snr(schedule(1000))
    assert alpha_bars[-1] == 0
    torch.testing.assert_close(alpha_bars[0], schedule(1000)[0])
    assert (alpha_bars.diff() < 0).all()


def test_zero_terminal_snr_follows_the_papers_worked_formula():
    stretched = zero_terminal_snr(torch.tensor([0.81, 0.25, 0.01], dtype=torch.float64))
    # roots 0.9, 0.5, 0.1: less 0.1, times 0.9 / 0.8
    expected = torch.tensor([0.9, 0.45, 0.0], dtype=torch.float64) ** 2
    torch.testing.assert_close(stretched, expected)


@given(n=st.integers(1, 1000), data=st.data())
def test_every_walk_starts_at_the_noisiest_level_and_never_stands_still(n, data):
    steps = data.draw(st.integers(1, n))
    timesteps = Schedule(torch.linspace(0.9, 0.1, n)).timesteps(steps)
    assert len(timesteps) == steps
    assert timesteps[0] == n - 1
    assert timesteps[-1] >= 0
    assert (timesteps.diff() < 0).all()


def test_levels_are_evenly_spaced_from_the_end():
    assert Schedule(cosine(1000)).timesteps(4).tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(levels_for(cosine(1000), 4), cosine(1000)[[999, 749, 499, 249]])
    torch.testing.assert_close(Schedule(cosine(10)).levels(10), cosine(10).flip(0))


def test_a_schedule_looks_up_the_level_of_each_case():
    schedule = Schedule(torch.tensor([0.9, 0.5, 0.1]))
    torch.testing.assert_close(schedule.alpha_bar(torch.tensor([2, 0])), torch.tensor([0.1, 0.9]))
    assert len(schedule) == 3


@pytest.mark.parametrize("steps", [0, 11])
def test_a_walk_of_impossible_length_is_refused(steps):
    with pytest.raises(ValueError, match="between 1 and 10 steps"):
        levels_for(cosine(10), steps)


def test_a_walk_joins_neighbours_and_ends_clean(x_T):
    steps = [
        (noise_level, now.tolist(), after.tolist())
        for noise_level, now, after in walk(torch.tensor([0.0, 0.25]), x_T)
    ]
    assert steps == [(1.0, [0.0] * 3, [0.25] * 3), (0.75, [0.25] * 3, [1.0] * 3)]


def test_the_levels_of_a_walk_are_in_the_precision_and_on_the_device_of_the_noise(x_T):
    for noise_level, now, after in walk(torch.tensor([0.1, 0.5]), x_T):
        assert isinstance(noise_level, float)
        assert (now.dtype, after.dtype) == (x_T.dtype, x_T.dtype)
        assert (now.device, after.device) == (x_T.device, x_T.device)


@pytest.mark.parametrize("levels", [[0.9, 0.1], [0.5, 0.5], [0.5, 1.0], [-0.1, 0.5]])
def test_levels_in_the_wrong_order_or_range_are_refused(levels, x_T):
    with pytest.raises(ValueError, match="rise from noisiest"):
        list(walk(torch.tensor(levels), x_T))
