import base64
import io
import math
import re
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from clinfuse.reporting.figures import (
    ACCENT,
    LARGEST_FIGURE_BYTES,
    case_figure,
    figure_png,
    figure_svg,
    pictures_figure,
    reliability_figure,
    robustness_figure,
    save_figures,
)
from clinfuse.reporting.rows import case_rows
from clinfuse.reporting.tables import headline
from clinfuse.reporting.views import CaseView

KEY = {"preset": "stroke", "mask_source": "expert", "steps": 0, "seed": 0}


def noisy_case(case_id="case_000", shape=(10, 40, 36), spread=True):
    """An ellipsoid of noise: the hardest content to compress."""
    random = np.random.default_rng(0)
    axes = [np.linspace(-1.2, 1.2, n) for n in shape]
    head = sum(a**2 for a in np.meshgrid(*axes, indexing="ij")) < 1
    mri, ct, fused = (np.where(head, v, -1) for v in random.uniform(-0.7, 1, (3, *shape)))
    return CaseView(
        case_id,
        mri,
        ct,
        fused,
        (5.0, 2.0, 2.0),
        reference=mri,
        spread=np.abs(fused - mri) / 4 if spread else None,
        lesion=head & (random.uniform(size=shape) > 0.9),
    )


@pytest.fixture
def table():
    rows = []
    for method, fall in (("ours", 0.5), ("mask_composite", 6.0), ("average", 0.2), ("max", 0.2)):
        for mm in (0.0, 1.0, 3.0):
            for case in range(4):
                psnr = 30 - fall * mm + 0.1 * case
                scores = [("bone", "psnr", psnr), ("brain", "ssim", psnr / 40)]
                key = {"case_id": f"case_{case}", "method": method, "misregistration_mm": mm}
                rows += case_rows(scores, **key, **KEY)
    return headline(rows)


def test_a_case_has_a_tile_for_each_plane_and_panel_on_one_scale():
    figure = case_figure(noisy_case())
    tiles = [axes for axes in figure.axes if axes.images]
    assert len(tiles) == 15
    widths = {np.ptp(axes.get_xlim()).round(6) for axes in tiles}
    assert len(widths) == 1
    figure.draw_without_rendering()
    for axes in tiles:  # a millimetre is equally long in both directions
        box = axes.get_window_extent()
        per_mm = box.width / np.ptp(axes.get_xlim()), box.height / abs(np.ptp(axes.get_ylim()))
        assert per_mm[0] == pytest.approx(per_mm[1], rel=1e-6)


def test_every_tile_carries_its_four_directions():
    for number, axes in enumerate(case_figure(noisy_case()).axes[:15]):
        texts = {text.get_text() for text in axes.texts}
        assert texts >= [set("RLAP"), set("RLSI"), set("APSI")][number // 5]


def test_the_lesion_is_outlined_on_the_mri_only():
    axes = case_figure(noisy_case()).axes
    assert len(axes[0].lines) > 1  # the bar of 50 mm, then borders
    assert all(not other.lines for other in axes[1:5])
    start, end = axes[0].lines[0].get_xdata()
    assert end - start == 50


def test_curves_go_through_the_means_of_the_table(table):
    figure = robustness_figure(table, highlight="ours")
    bone, brain = figure.axes
    assert (bone.get_title(loc="left"), brain.get_title(loc="left")) == (
        "Bone PSNR (dB)",
        "Brain SSIM",
    )
    drawn = {line.get_color(): line.get_xydata() for line in bone.lines}
    expected = table.loc["ours", ("bone", "psnr")].unstack()["mean"]
    np.testing.assert_allclose(drawn[ACCENT], list(expected.items()))
    assert len(bone.lines) == 4 and len(bone.collections) == 1  # one band, that of ours
    assert [text.get_text() for text in bone.get_xticklabels()] == ["0", "1", "3"]


def test_names_of_lines_do_not_overlap_and_keep_the_lines_order(table):
    figure = robustness_figure(table)
    figure.draw_without_rendering()
    boxes = {t.get_text(): t.get_window_extent() for t in figure.axes[0].texts}
    assert set(boxes) == set(table.index)
    ordered = sorted(boxes.values(), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(ordered))
    assert boxes["mask_composite"].y0 == ordered[0].y0


def test_undefined_and_infinite_means_leave_gaps():
    rows = []
    for mm, value in ((0.0, math.inf), (1.0, math.nan), (2.0, 20.0)):
        key = {"case_id": "a", "method": "copy", "misregistration_mm": mm}
        rows += case_rows([("bone", "psnr", value)], **key, **KEY)
    [line] = robustness_figure(headline(rows)).axes[0].lines
    assert np.isnan(line.get_ydata()).tolist() == [True, True, False]


def test_files_are_named_after_cases_and_small(tmp_path, table):
    cases = [noisy_case("a/b", (12, 80, 70)), noisy_case("a_b"), noisy_case("..", spread=False)]
    paths = save_figures(tmp_path / "figures", cases, table, highlight="ours")
    assert [p.name for p in paths] == ["a_b.png", "a_b_2.png", "case.png", "robustness.png"]
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(p.name for p in paths)
    for path in paths:
        assert 1000 < path.stat().st_size <= LARGEST_FIGURE_BYTES
        assert Image.open(path).width > 500


def test_a_figure_that_is_too_large_gets_coarser():
    figure = Figure(figsize=(4, 4))
    figure.subplots().imshow(np.random.default_rng(0).random((300, 300)), cmap="gray")
    content = figure_png(figure, dpi=100.0, largest_bytes=20_000)
    assert len(content) <= 20_000
    assert 50 < Image.open(io.BytesIO(content)).width < 400


def test_a_palette_keeps_greys_and_white():
    figure = Figure(figsize=(4, 4), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.random.default_rng(0).random((200, 200)), cmap="gray", vmin=0, vmax=1)
    axes.axis("off")
    full = figure_png(figure, 100.0, 10**9)
    exact = np.asarray(Image.open(io.BytesIO(full)).convert("RGB"))
    image = Image.open(io.BytesIO(figure_png(figure, 100.0, len(full) - 1)))
    assert image.mode == "P" and image.size == exact.shape[1::-1]
    shown = np.asarray(image.convert("RGB")).astype(int)
    assert abs(shown - exact).max() <= 255 / 118 / 2 + 1
    assert shown[exact == 255].min() == 255


def test_a_palette_keeps_the_hue_of_fused_colour():
    hue, value = np.meshgrid(np.linspace(0, 1, 160), np.linspace(0.3, 1, 160))
    noise = 0.03 * np.random.default_rng(0).random((160, 160))
    colours = hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.8), value - noise], -1))
    figure = Figure(figsize=(4, 4), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(colours, interpolation="nearest")
    axes.axis("off")
    full = figure_png(figure, 80.0, 10**9)
    exact = np.asarray(Image.open(io.BytesIO(full)).convert("RGB")) / 255
    image = Image.open(io.BytesIO(figure_png(figure, 80.0, len(full) - 1)))
    assert image.mode == "P" and image.size == exact.shape[1::-1]
    shown = rgb_to_hsv(np.asarray(image.convert("RGB")) / 255)[..., 0]
    off = abs(shown - rgb_to_hsv(exact)[..., 0])
    assert np.median(np.minimum(off, 1 - off)) < 10 / 360


def test_svg_for_a_page_has_no_link_and_takes_the_pages_colours(table):
    svg = figure_svg(robustness_figure(table, "ours"), {ACCENT: "var(--accent)"})
    assert svg.startswith("<svg viewBox=") and svg.rstrip().endswith("</svg>")
    assert "http" not in svg and "<metadata" not in svg and "<style" not in svg
    assert "var(--accent)" in svg and ACCENT not in svg
    assert "mask_composite</text>" in svg
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(ids)


def test_reliability_shows_what_was_found_against_what_was_stated_on_one_scale():
    stated = np.array([0.01, 0.05, 0.2])
    points = {
        "Brain": {"as stated": np.stack([stated, 2 * stated], 1), "calibrated": np.empty((0, 2))},
        "Bone": {"as stated": np.empty((0, 2)), "calibrated": np.stack([stated, stated], 1)},
    }
    brain, bone = (axes for axes in reliability_figure(points).axes)
    for axes, kind, factor in ((brain, "as stated", 2), (bone, "calibrated", 1)):
        (line,) = (line for line in axes.lines if line.get_label() == kind)
        np.testing.assert_allclose(line.get_ydata(), factor * np.asarray(line.get_xdata()))
        assert len(line.get_xdata()) == 3
        assert axes.get_xlim() == axes.get_ylim() == brain.get_xlim()
    low, high = brain.get_xlim()
    assert low < 0.01 and high > 0.4


def test_reliability_says_which_side_of_the_diagonal_says_too_little():
    stated = np.array([0.01, 0.05, 0.2])
    kinds = {"as stated": np.stack([stated, 2 * stated], 1), "calibrated": np.empty((0, 2))}
    figure = reliability_figure({"Brain": kinds, "Bone": kinds})
    figure.draw_without_rendering()
    for axes in figure.axes:
        sides = {text.get_text(): text.get_window_extent() for text in axes.texts}
        for words, is_above in (("says too little", True), ("says too much", False)):
            (x_0, y_0), (x_1, y_1) = axes.transData.inverted().transform(sides[words].get_points())
            assert (y_0 > x_1) if is_above else (y_1 < x_0)
        (title,) = (t for t in axes.findobj(Text) if t.get_text() in ("Brain", "Bone"))
        assert title.get_window_extent().y1 <= figure.bbox.y1  # not cut off
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["stated = found", "as stated", "calibrated"]
    assert legend.legend_handles[0].get_linestyle() == "--"


def test_no_text_of_any_figure_is_too_small_to_be_set(tmp_path, table, caplog):
    caplog.set_level("INFO", logger="matplotlib.font_manager")
    points = {"Brain": {"calibrated": np.array([[0.02, 0.03], [0.2, 0.3]])}}
    charts = {"reliability": reliability_figure(points)}
    save_figures(tmp_path, [noisy_case("case")], table, charts=charts)
    assert "Fontsize" not in caplog.text
    (axes,) = charts["reliability"].axes
    for axis in (axes.xaxis, axes.yaxis):  # lines at every decade, their ticks between unlabelled
        assert {label.get_text() for label in axis.get_minorticklabels()} == {""}
        assert "0.1" in {label.get_text() for label in axis.get_majorticklabels()}


def test_charts_are_written_beside_the_cases_under_their_names(tmp_path, table):
    chart = Figure()
    written = save_figures(tmp_path, [noisy_case("chart")], table, charts={"chart": chart})
    assert [path.name for path in written] == ["chart_2.png", "robustness.png", "chart.png"]


def test_pictures_are_shown_in_their_own_levels_and_colours():
    random = np.random.default_rng(0)
    colour, grey = (random.integers(0, 256, s, dtype=np.uint8) for s in ((20, 30, 3), (20, 30)))
    row = {"colour": Image.fromarray(colour), "grey": Image.fromarray(grey)}
    svg = figure_svg(pictures_figure([row, row]))
    embedded = re.findall(r'href="data:image/png;base64,([^"]+)"', svg)
    assert len(embedded) == 4
    shown = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in embedded[:2]]
    np.testing.assert_array_equal(shown[0], colour)
    np.testing.assert_array_equal(shown[1], np.stack([grey] * 3, -1))


def test_large_pictures_are_reduced_for_the_figure_and_left_as_they_are():
    large = Image.fromarray(np.zeros((900, 600), np.uint8))
    axes = pictures_figure([{"large": large}], largest_px=90).axes[0]
    assert axes.images[0].get_array().shape[:2] == (90, 60) and large.size == (600, 900)
