import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clinfuse.functional.colour import coloured, into_gamut, rgb_to_ycbcr, ycbcr_to_rgb


def levels():
    """Every 15th level of R, G and B, with the corners of the cube."""
    steps = torch.arange(0, 256, 15)
    return torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij")).flatten(1)


def test_ycbcr_agrees_with_the_jpeg_library():
    rgb = levels()
    ours = 255 * rgb_to_ycbcr(rgb[None].double() / 255)[0] + torch.tensor([[0], [128], [128]])
    picture = Image.fromarray(rgb.T[None].contiguous().numpy().astype(np.uint8))
    theirs = torch.from_numpy(np.asarray(picture.convert("YCbCr")).astype(float))[0].T
    # theirs are whole levels by 16-bit tables, and end at 255 where Cb and Cr reach 255.5
    assert (ours - theirs).abs().max() < 1.01
    assert ours[0].tolist() == pytest.approx(0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2])


def test_chroma_ends_at_one_half_for_blue_and_red_and_is_nothing_for_grey():
    red, blue, grey = [1.0, 0, 0], [0, 0, 1.0], [0.4, 0.4, 0.4]
    colours = torch.tensor([red, blue, grey], dtype=torch.float64).T[None]
    _, cb, cr = rgb_to_ycbcr(colours)[0]
    assert cr[0] == pytest.approx(0.5) and cb[1] == pytest.approx(0.5)
    assert cb[2] == pytest.approx(0) and cr[2] == pytest.approx(0)


def test_rgb_comes_back():
    rgb = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ycbcr_to_rgb(rgb_to_ycbcr(rgb)), rgb)


unit = st.floats(0, 1, allow_subnormal=False)


@given(luma=unit, red=unit, green=unit, blue=unit)
def test_another_luma_keeps_hue_is_in_gamut_and_loses_no_more_saturation_than_it_must(
    luma, red, green, blue
):
    chroma = rgb_to_ycbcr(torch.tensor([[[red], [green], [blue]]], dtype=torch.float64))[:, 1:]
    at = torch.full((1, 1, 1), luma, dtype=torch.float64)
    rgb = coloured(at, chroma)
    assert rgb.min() >= 0 and rgb.max() <= 1
    y, *kept = rgb_to_ycbcr(rgb)[0].flatten().tolist()
    assert y == pytest.approx(luma, abs=1e-9)
    cb, cr = chroma.flatten().tolist()
    assert kept[0] * cr - kept[1] * cb == pytest.approx(0, abs=1e-9)  # one direction,
    assert kept[0] * cb + kept[1] * cr >= -1e-9  # not the opposite one
    if abs(kept[0] - cb) + abs(kept[1] - cr) > 1e-9:  # it lost some: a hair more is out of gamut
        assert float(rgb.min()) < 1e-9 or float(rgb.max()) > 1 - 1e-9


def test_what_rgb_has_is_left_as_it_is():
    ycbcr = rgb_to_ycbcr(0.01 + 0.98 * torch.rand(1, 3, 20, 20, dtype=torch.float64))
    assert torch.equal(into_gamut(ycbcr[:, :1], ycbcr[:, 1:]), ycbcr[:, 1:])


def test_clipping_instead_would_have_turned_the_hue():
    red = torch.tensor([[[0.9], [0.3], [0.1]]], dtype=torch.float64)
    y, chroma = torch.full((1, 1, 1), 0.8, dtype=torch.float64), rgb_to_ycbcr(red)[:, 1:]
    clipped = rgb_to_ycbcr(ycbcr_to_rgb(torch.cat((y, chroma), 1)).clamp(0, 1))[:, 1:]
    ours = rgb_to_ycbcr(coloured(y, chroma))[:, 1:]

    def degrees_between(a, b):
        angles = [torch.rad2deg(torch.atan2(c[0, 1, 0], c[0, 0, 0])) for c in (a, b)]
        return abs(float(angles[0] - angles[1]))

    assert degrees_between(ours, chroma) < 1e-9 and degrees_between(clipped, chroma) > 5
