import torch

from clinfuse.functional.eight_bit import case_sums, eight_bit, eight_bit_slices


def test_every_level_of_a_png_comes_back_exactly():
    levels = torch.arange(256.0).reshape(1, 1, 16, 16)
    assert torch.equal(eight_bit(levels / 127.5 - 1), levels)


def test_what_lies_between_levels_is_rounded_and_what_lies_outside_clipped():
    image = torch.tensor([-1.5, -1.0, 0.001, 1.0, 3.0]).reshape(1, 1, 1, 5)
    assert eight_bit(image).flatten().tolist() == [0, 0, 128, 255, 255]


def test_the_slices_of_a_case_are_summed_to_one_value():
    volume = torch.rand(2, 1, 3, 4, 5) * 2 - 1
    slices = eight_bit_slices(volume)
    assert slices.shape == (6, 4, 5)
    torch.testing.assert_close(case_sums(slices, 2), eight_bit(volume).flatten(1).sum(1))
