import io
import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from clinfuse.reporting.figures import ACCENT, LARGEST_FIGURE_BYTES, figure_svg
from clinfuse.reporting.robustness import (
    AXES,
    COLOURS,
    FILES,
    robustness_files,
    robustness_grid,
    robustness_of,
    robustness_table,
)
from clinfuse.reporting.rows import as_rows, case_rows
from clinfuse.reporting.tables import bootstrap_interval

AMOUNTS = {
    "noise_std": (0.1, 0.2),
    "mask_dilation_mm": (-2.0, 2.0),
    "without_lesion": (1.0,),
    "rotation_deg": (2.0,),
}
SCORES = {("bone", "psnr"): 30.0, ("brain", "ssim"): 0.9, ("lesion", "dice"): 0.6}
KEY = {"preset": "stroke", "mask_source": "expert", "steps": 0, "seed": 0}


def scored(method, mm=0.0, perturbation="", amount=0.0, fall=1.0, patients=5, **changes):
    """Rows whose values fall with what is wrong, and rise from case to case."""
    wrong = fall * (mm + abs(amount))
    return [
        row
        for case in range(patients)
        for row in case_rows(
            [(*score, level * (1 - 0.02 * wrong + 0.01 * case)) for score, level in SCORES.items()],
            case_id=f"case_{case}",
            method=method,
            misregistration_mm=mm,
            perturbation=perturbation,
            amount=amount,
            **{**KEY, **changes},
        )
    ]


def everything(method, **changes):
    rows = [row for mm in (0.0, 2.0) for row in scored(method, mm, **changes)]
    for perturbation, amounts in AMOUNTS.items():
        for amount in amounts:
            rows += scored(method, 0.0, perturbation, amount, **changes)
    return rows


@pytest.fixture
def rows():
    return everything("ours", fall=0.3) + everything("average") + everything("maximum", fall=2.0)


def test_each_axis_has_its_amounts_and_starts_at_the_unperturbed_rows(rows):
    table = robustness_table(rows)
    key = ["axis", "at_mm", "method", "roi", "metric"]
    amounts = {axis: sorted(of["amount"].unique()) for axis, of in table.groupby("axis")}
    assert amounts == {
        "misregistration_mm": [0, 2], "rotation_deg": [0, 2], "noise_std": [0, 0.1, 0.2],
        "mask_dilation_mm": [-2, 0, 2], "without_lesion": [0, 1],
    }  # fmt: skip
    assert list(table["axis"].unique()) == [axis for axis in AXES if axis in amounts]
    starts = table[table["amount"] == 0].groupby(key[2:])["mean"].nunique()
    assert len(starts) == 9 and (starts == 1).all()
    assert set(table["at_mm"]) == {0.0} and set(table["n"]) == {5}


def test_means_and_intervals_are_those_of_the_rows(rows):
    frame = as_rows(rows)
    table = robustness_table(frame)
    chosen = table.query("axis == 'noise_std' and amount == 0.2 and method == 'maximum'")
    line = chosen[(chosen["roi"] == "bone")].iloc[0]
    values = frame.query(
        "perturbation == 'noise_std' and amount == 0.2 and method == 'maximum' and roi == 'bone'"
    )["value"].to_numpy()
    assert line["mean"] == pytest.approx(values.mean())
    assert (line["low"], line["high"]) == pytest.approx(bootstrap_interval(values))


def test_an_axis_tried_under_two_misregistrations_is_two_and_each_has_its_start():
    rows = scored("ours", 0.0) + scored("ours", 2.0)
    rows += scored("ours", 0.0, "noise_std", 0.1) + scored("ours", 2.0, "noise_std", 0.1)
    table = robustness_table(rows).query("axis == 'noise_std' and roi == 'bone'")
    means = table.set_index(["at_mm", "amount"])["mean"]
    level = 30 * 1.02  # of the middle case
    expected = {(mm, a): level - 30 * 0.02 * (mm + a) for mm in (0, 2) for a in (0, 0.1)}
    assert means.to_dict() == pytest.approx(expected)
    assert "CT moved by 2 mm" in texts(robustness_grid(robustness_table(rows)))


def test_a_method_that_was_not_perturbed_has_no_line_on_that_axis(rows):
    table = robustness_table(rows + scored("plain", 0.0) + scored("plain", 2.0))
    assert set(table.query("method == 'plain'")["axis"]) == {"misregistration_mm"}


def test_variants_of_a_method_have_lines_of_their_own():
    rows = everything("ours") + everything("ours", mask_source="none")
    methods = set(robustness_table(rows)["method"])
    assert methods == {"ours (mask source expert)", "ours (mask source none)"}


def texts(figure):
    return figure_svg(figure).replace("\n", " ")


def panels_of(figure):
    """Axes by (score, axis): their order is that of the grid."""
    columns = len({axes.get_subplotspec().colspan.start for axes in figure.axes})
    return [figure.axes[at : at + columns] for at in range(0, len(figure.axes), columns)]


def test_the_figure_has_scores_by_axes_and_a_line_for_each_method(rows):
    figure = robustness_grid(robustness_table(rows), "ours")
    grid = panels_of(figure)
    assert len(grid) == 3 and {len(line) for line in grid} == {5}
    assert [line[0].get_ylabel() for line in grid] == [
        "Bone PSNR (dB) ↑", "Brain SSIM ↑", "Lesion Dice ↑",
    ]  # fmt: skip
    titles = [axes.get_title().split("\n")[0] for axes in grid[0]]
    assert titles == [
        "Misregistration", "CT turned", "Masks dilated", "Noise", "Lesion mask",
    ]  # fmt: skip
    noise = grid[0][3]
    drawn = {to_hex(line.get_color()): line for line in noise.lines}
    assert len(drawn) == 3 and ACCENT in drawn
    expected = robustness_table(rows).query(
        "axis == 'noise_std' and method == 'ours' and roi == 'bone'"
    )
    np.testing.assert_allclose(drawn[ACCENT].get_xdata(), [0, 0.1, 0.2])
    np.testing.assert_allclose(drawn[ACCENT].get_ydata(), expected["mean"])
    assert len(noise.collections) == 3  # three methods: each has its band
    assert {axes.get_ylim() for axes in grid[0]} == {noise.get_ylim()}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["ours", "average", "maximum"]
    shown = [label.get_text() for label in grid[-1][-1].get_xticklabels()]
    assert shown == ["given", "withheld"]


def test_with_many_methods_only_the_one_set_off_has_a_band_and_every_line_is_its_own():
    methods = [f"a_method_of_a_long_name_{number}" for number in range(15)]
    rows = [row for fall, method in enumerate(methods) for row in everything(method, fall=fall)]
    figure = robustness_grid(robustness_table(rows, resamples=20), methods[3])
    (panel, *_), *_ = panels_of(figure)
    assert len(panel.collections) == 1 and len(panel.lines) == 15
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in panel.lines}
    assert len({(colour, dashes) for colour, _, dashes in looks}) == 15
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width
    assert max(axes.get_tightbbox().y0 for axes in figure.axes[-3:]) >= legend.y1


def test_two_patients_have_no_band(rows):
    figure = robustness_grid(robustness_table([r for r in rows if r["case_id"] < "case_2"]))
    bands = [band for axes in figure.axes for band in axes.collections]
    assert len(bands) == 45 and not any(band.get_paths() for band in bands)


def machado(rgb, matrix):
    """What a dichromat sees: Machado et al. (2009), severity 1, in linear RGB."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(matrix) @ linear, 0, 1)
    return np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]],
    ],
    ids=["trichromat", "protanope", "deuteranope", "tritanope"],
)  # fmt: skip
def test_colours_are_told_apart_by_colour_blind_readers(matrix):
    colours = [np.array(list(bytes.fromhex(c[1:]))) / 255 for c in (ACCENT, *COLOURS)]
    seen = [rgb2lab(machado(colour, matrix)) for colour in colours]
    assert min(deltaE_ciede2000(a, b) for a, b in combinations(seen, 2)) > 10  # 2.3: just seen


def test_files_are_the_numbers_and_the_figure_small_enough(rows):
    table, figure = robustness_of(rows, "ours")
    files = robustness_files(table, figure)
    assert tuple(files) == FILES
    csv, png, pdf = files.values()
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(csv)), table, check_dtype=False)
    assert len(png) <= LARGEST_FIGURE_BYTES and Image.open(io.BytesIO(png)).width > 1000
    assert pdf.startswith(b"%PDF")


def test_rows_of_unperturbed_cases_alone_have_no_such_figure():
    assert robustness_of(scored("ours") + scored("ours", 2.0)) is None


def test_pairs_without_regions_are_shown_by_what_they_keep():
    rows = []
    for amount in (0.0, 0.1):
        wrong = {"perturbation": "noise_std" if amount else "", "amount": amount}
        scores = [("whole", "qabf", 0.6 - amount), ("bone", "psnr", math.nan)]
        rows += case_rows(
            scores, case_id="a", method="ours", misregistration_mm=0.0, **wrong, **KEY
        )
    table, figure = robustness_of(rows)
    assert set(table["metric"]) == {"qabf"} and len(figure.axes) == 1
