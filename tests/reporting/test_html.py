import base64
import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clinfuse.reporting.figures import reliability_figure
from clinfuse.reporting.html import write_report
from clinfuse.reporting.rows import case_rows
from clinfuse.reporting.tables import (
    CALIBRATION_SCORES,
    conspicuity_table,
    headline,
    score_cells,
)
from clinfuse.reporting.views import CANVAS_MARGIN_MM, CaseView, chosen_slices, cropped, head_box

SPACING_MM = (5.0, 2.0, 2.0)
FACTS = {"preset": "stroke", "β bone": 1.2, "commit": "3f9c1ab"}


def case(case_id="case_000", shape=(8, 30, 28), **changes):
    axes = [np.linspace(-1.2, 1.2, n) for n in shape]
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    ramp = np.broadcast_to(axes[2], shape)
    mri = np.where(radius < 1, 0.5 * ramp, -1.0)
    ct = np.where(radius < 1, np.where(radius > 0.8, 0.9, -0.3), -1.0)
    lesion = np.zeros(shape, bool)
    lesion[5, 12:16, 18:21] = True
    view = CaseView(
        case_id,
        mri,
        ct,
        np.where(radius > 0.8, ct, mri),
        SPACING_MM,
        reference=np.where(radius > 0.85, ct, mri),
        spread=0.1 * (radius < 1),
        lesion=lesion,
        caption="ours, CT moved by 2 mm",
        scores={"bone PSNR": 24.3123, "lesion Dice": float("nan")},
    )
    return replace(view, **changes)


def rows_of(scores, methods=("ours", "average"), amplitudes=(0.0, 2.0)):
    """Five cases; each score of ``scores`` is lower by 20 % for every further method."""
    rows = []
    for rank, method in enumerate(methods):
        for mm in amplitudes:
            for number in range(5):
                key = {"case_id": str(number), "method": method, "misregistration_mm": mm}
                key |= {"preset": "stroke", "mask_source": "expert", "steps": 6, "seed": 0}
                values = [
                    (*score, (1 - 0.2 * rank) * (level - mm + 0.3 * number))
                    for score, level in scores.items()
                ]
                rows += case_rows(values, **key)
    return rows


@pytest.fixture
def table():
    return headline(rows_of({("bone", "psnr"): 25.0}))


def report(tmp_path, cases, tables=None, facts=FACTS, **options):
    path = write_report(
        tmp_path / "run" / "report.html", "A run", cases, tables or {}, facts, **options
    )
    return path.read_text("utf-8")


def test_the_report_needs_nothing_but_itself(tmp_path, table, page_of):
    text = report(tmp_path, [case()], {"Scores": table}, highlight="ours")
    page = page_of(text)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    outside = r"https?:|//[a-z]|@import|url\((?!#)"
    assert not re.search(outside, re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text))
    links = [a["href"] for t, a in page.elements if t in ("a", "use") and "href" in a]
    assert all(link.startswith("#") for link in links)


def test_the_page_is_well_formed_and_its_links_lead_somewhere(tmp_path, table, page_of):
    page = page_of(report(tmp_path, [case("a"), case("b")], {"Scores": table}, highlight="ours"))
    assert page.unbalanced == [] and page.open == []
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert {a["href"][1:] for a in page.all("a")} <= ids


def test_facts_title_and_the_warning_are_there(tmp_path, page_of):
    text = " ".join(page_of(report(tmp_path, [])).text)
    for expected in ("A run", "Research use only", *FACTS, *map(str, FACTS.values())):
        assert expected in text


def test_both_themes_define_every_colour(tmp_path):
    text = report(tmp_path, [])
    light, dark = (
        re.findall(r"(--[\w-]+):", b) for b in re.findall(r":root \{(.*?)\}", text, re.S)
    )
    used = set(re.findall(r"var\((--[\w-]+)\)", text)) - {"--columns", "--sans"}
    assert used <= set(light) and set(light) - {"--sans"} == set(dark)


def test_what_a_user_typed_cannot_become_markup(tmp_path):
    nasty = "<script>alert(1)</script>"
    frame = pd.DataFrame({nasty: [nasty]})
    text = report(tmp_path, [case(nasty, caption=nasty)], {nasty: frame}, {nasty: nasty})
    assert "<script" not in text and "&lt;script&gt;" in text


def test_headline_cells_show_mean_interval_and_the_best_in_bold(tmp_path, table):
    text = report(tmp_path, [], {"Scores": table}, highlight="ours")
    for method, cells in score_cells(table, "bone", "psnr").items():
        for cell in cells:
            assert cell.is_best == (method == "ours")
            mean = f"<b>{cell.mean}</b>" if cell.is_best else cell.mean
            assert f"<td>{mean}<small>{cell.interval}</small></td>" in text
    assert text.count('<tr class="ours">') == 1
    assert text.count("<svg viewBox") == 1 and "n = 5 cases" in text


def test_a_report_of_a_run_without_scores_or_cases_is_written(tmp_path):
    text = report(tmp_path, [], {"Scores": headline([])})
    assert "n = 0 cases" in text and "<svg" not in text and ">Cases<" not in text


def lines_of(text):
    """The lines of the one table in a page, as texts of cells without small print."""
    (table,) = re.findall(r"<table>(.*?)</table>", text, re.S)
    lines = re.findall(r"<tr.*?</tr>", re.sub(r"<small.*?</small>", "", table), re.S)
    return [
        [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", line, re.S)]
        for line in lines
    ]


def test_scores_at_one_amplitude_are_one_table_of_methods_without_curves(tmp_path):
    scores = {("bone", "psnr"): 20.0, ("brain", "ssim"): 0.5}
    for amplitude, said in ((0.0, "The CT was not moved."), (2.0, "The CT was moved by 2 mm.")):
        table = headline(rows_of(scores, amplitudes=(amplitude,)))
        text = report(tmp_path, [], {"Scores": table}, highlight="average")
        assert said in text and "The shaded row is average." in text and "<svg" not in text
        psnr, ssim = (score_cells(table, *score) for score in scores)
        assert lines_of(text) == [
            ["method", "Bone PSNR (dB)", "Brain SSIM"],
            *([m, psnr[m][0].mean, ssim[m][0].mean] for m in ("ours", "average")),
        ]
        assert text.count('<tr class="ours"><td>average') == 1


def test_scores_of_one_method_are_one_table_of_scores_and_a_curve_of_each(tmp_path):
    scores = {("bone", "coverage"): 0.5, ("whole", "ence"): 0.3, ("whole", "ause"): 0.2}
    table = headline(rows_of(scores, ("ours",)), CALIBRATION_SCORES)
    text = report(tmp_path, [], {"Calibration": table}, highlight="ours")
    assert lines_of(text) == [
        ["ours", "0 mm", "2 mm"],
        *(
            [label, *(cell.mean for cell in score_cells(table, *score)["ours"])]
            for label, score in zip(
                ("Bone coverage", "Whole ENCE", "Whole AUSE"), scores, strict=True
            )
        ),
    ]
    assert text.count("<svg viewBox") == 3 and "<b>" not in text.partition("How to read")[0]
    assert re.search(r"<text[^>]*>Bone coverage</text>", text)  # each curve says whose it is


def test_findings_are_shown_by_kind_with_the_lowest_of_them_under_the_median(tmp_path):
    rows = rows_of({("lesion", "conspicuity"): 2.5, ("lesion", "conspicuity_min"): 2.4})
    text = report(tmp_path, [], {"Findings": conspicuity_table(rows)}, highlight="ours")
    assert lines_of(text)[0] == ["Lesion on MRI, n = 5", "0 mm", "2 mm"]
    # the middle case is 0.6 above the first, and the other method has 0.8 times as much
    assert lines_of(text)[1:] == [["ours", "3.10", "1.10"], ["average", "2.48", "0.88"]]
    assert "<td><b>1.10</b><small>lowest 0.40, 0</small></td>" in text
    assert "1 keeps it as it was" in text and '<tr class="ours"><td>ours' in text


def test_any_other_table_is_shown_as_it_stands(tmp_path):
    frame = pd.DataFrame({"method": ["wavelet"], "p_holm": [0.03125]})
    text = report(tmp_path, [], {"Paired tests": frame})
    assert "<td>wavelet</td><td>0.03125</td>" in text and "Paired tests" in text


def test_each_case_has_fifteen_tiles_with_directions_in_true_proportions(tmp_path, page_of):
    view = case()
    page = page_of(report(tmp_path, [view], largest_bytes=10_000))  # no room for a stack
    assert page.all("img") == []  # nor for the case
    text = report(tmp_path, [replace(view, lesion=None)])
    text = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    page = page_of(text)
    assert len(page.all("img")) == len(page.all("figure", "tile")) == 15
    sides = re.findall(r'class="side left">(\w)<.*?right">(\w)<.*?top">(\w)<.*?bottom">(\w)<', text)
    assert sides == [tuple("RLAP")] * 5 + [tuple("RLSI")] * 5 + [tuple("APSI")] * 5
    d, h, w = np.multiply(cropped(view).mri.shape, SPACING_MM)
    sizes = [(w, h)] * 5 + [(w, d)] * 5 + [(h, d)] * 5
    for figure, picture, image, (across, along) in zip(
        page.all("figure", "tile"), page.all("div", "picture"), page.all("img"), sizes, strict=True
    ):
        width, height = map(float, re.findall(r"[\d.]+", figure["style"]))
        assert width == pytest.approx(max(h, w) + 2 * CANVAS_MARGIN_MM)
        part = [float(number) / 100 for number in re.findall(r"([\d.]+)%", picture["style"])]
        assert (width * part[0], height * part[1]) == pytest.approx((across, along), abs=0.01)
        shown = decoded(image)
        assert shown.width / shown.height == pytest.approx(across / along, rel=0.02)


def test_overlays_lie_over_the_fused_image_in_every_plane_with_a_legend_in_units(tmp_path, page_of):
    random = np.random.default_rng(0).random((8, 30, 28))
    view = case(reference=None, epistemic=0.1 * random, aleatoric=0.2 * random)
    view = replace(view, lesion_probability=np.where(view.lesion, 0.9, 0.1))
    text = re.sub(r"<details>.*?</details>", "", report(tmp_path, [view]), flags=re.S)
    page = page_of(text)
    over = page.all("img", "over")
    assert len(page.all("figure", "tile")) == 3 * (4 + 3) and len(over) == 3 * 3
    assert all(decoded(image).mode == "P" for image in over)
    images = page.all("img")
    fused = [image["src"] for image in images if image["alt"].startswith("Fused, axial")]
    beneath = images[images.index(over[0]) - 1]
    assert [beneath["src"]] == fused and beneath["alt"] == ""
    assert page.open == [] and page.unbalanced == []
    assert len(page.all("path", "contour")) == 3
    assert text.count('<div class="unit">model units</div>') == 6
    assert text.count('<div class="unit">probability</div>') == 1
    assert "Epistemic</b> is the part" in text and "no second opinion" in text
    assert 'class="bare"' in text
    panels, beneath = re.findall(r'<div class="viewer"(.*?)><div class="inner', text)
    assert panels == "" and "width: 100.00%" in beneath  # a name and three overlays, as four panels
    two = report(tmp_path, [replace(view, reference=view.mri, lesion_probability=None)])
    assert "width: 60.00%" in two  # of five panels, so that tiles are as wide and no room is black


def test_a_lone_overlay_stands_beside_the_other_panels(tmp_path):
    view = case(reference=None, aleatoric=0.2 * np.ones((8, 30, 28)))
    text = report(tmp_path, [view])
    assert text.count('<div class="viewer">') == 1 and "--columns: 5" in text
    assert "no second opinion" not in text and "Aleatoric</b> is the part" in text
    assert "Aleatoric</b> is the part" not in report(tmp_path, [case()])


def test_presets_stand_side_by_side_with_their_differences_from_the_first(tmp_path, page_of):
    view = case(reference=None)
    other = replace(view, fused=view.fused + 0.1 * view.lesion, caption="α 0.5, β 2, γ 2")
    presets = {"stroke": replace(view, caption="α 1"), "bone_tumor": other, "third": view}
    text = report(tmp_path, [], presets=presets)
    page = page_of(text)
    assert page.open == [] and page.unbalanced == []
    part, _, stack = text.partition("<details>")
    tiles = page_of(part).all("img")
    of_axial = [image["alt"].split(",")[0] for image in tiles if "axial" in image["alt"]]
    columns = ["MRI", "CT as given", *presets]
    assert of_axial == [*columns, "bone_tumor − stroke", "third − stroke"]
    assert len(tiles) == 3 * 7
    fused = {image["alt"].split(",")[0]: image for image in tiles if "axial" in image["alt"]}
    assert fused["stroke"]["src"] == fused["third"]["src"] != fused["bone_tumor"]["src"]
    orange = np.asarray(decoded(fused["bone_tumor − stroke"]).convert("RGB")).astype(int)
    assert orange[..., 0].max() > 200 and (orange[..., 0] >= orange[..., 2]).all()
    assert np.asarray(decoded(fused["third − stroke"]).convert("RGB")).max() <= 2  # black
    assert "<small>α 0.5, β 2, γ 2</small>" in part and "<small>α 1</small>" in part
    assert "colours end at ±0.1," in part and "No voxel differs" not in part
    assert len(page_of(stack).all("img")) == 5 * len(cropped(view).mri)


def test_presets_that_change_nothing_say_so(tmp_path):
    text = report(tmp_path, [], presets={"a": case(), "b": case()})
    assert "No voxel differs between these presets" in text


def test_presets_are_held_to_the_reports_size(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 1, (16, 60, 60))
    view = CaseView("noise", noise, noise[::-1], noise[:, ::-1], SPACING_MM)
    presets = {"a": view, "b": replace(view, fused=noise)}
    whole = report(tmp_path, [view], presets=presets)
    limit = len(whole.encode()) // 3
    text = report(tmp_path, [view], presets=presets, largest_bytes=limit)
    assert "<details>" in whole and "<details>" not in text
    assert len(text.encode()) <= limit and "b − a" in text


def decoded(image):
    return Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))


def test_the_tile_shows_the_chosen_slice_in_radiological_convention(tmp_path, page_of):
    view = case()
    first = np.asarray(decoded(page_of(report(tmp_path, [view])).all("img")[0])).astype(float)
    box, d = head_box(view), chosen_slices(view)[0]
    expected = view.mri[d][box[1:]][::-1, ::-1]
    middle = first[first.shape[0] // 2]
    assert d == 5
    inside = middle[len(middle) // 4 : -len(middle) // 4]
    assert (np.diff(inside) <= 0).all() and inside[0] > inside[
        -1
    ]  # the MRI is brighter to the right
    assert first.max() == pytest.approx(255 * (expected.max() + 1) / 2, abs=3)


def test_panels_that_a_case_lacks_are_not_shown(tmp_path, page_of):
    view = case(reference=None, spread=None, lesion=None)
    text = re.sub(r"<details>.*?</details>", "", report(tmp_path, [view]), flags=re.S)
    page = page_of(text)
    assert len(page.all("img")) == 9 and not page.all("input") and not page.all("path", "outline")
    assert "--columns: 3" in text


def test_the_lesion_is_outlined_and_its_volume_told(tmp_path, page_of):
    view = case()
    text = report(tmp_path, [view])
    assert len(page_of(text).all("path", "outline")) >= 9  # three planes of MRI, CT and fused
    volume_ml = 4 * 3 * 5 * 2 * 2 / 1000
    assert f"lesion {volume_ml:.1f} ml" in text
    assert "no lesion" in report(tmp_path, [case(lesion=np.zeros_like(view.lesion))])


def test_scores_of_a_case_are_shown_and_an_undefined_one_says_so(tmp_path):
    text = report(tmp_path, [case()])
    assert "<dt>bone PSNR</dt><dd>24.31</dd>" in text
    assert "<dt>lesion Dice</dt><dd>undefined</dd>" in text


def test_the_stack_holds_every_axial_slice_of_the_head(tmp_path, page_of):
    view = case()
    page = page_of(report(tmp_path, [view]))
    assert len(page.all("img")) == 15 + 3 * len(cropped(view).mri)
    assert len([a for a in page.all("div", "first")]) == 1


def test_a_report_of_many_noisy_cases_stays_within_its_size(tmp_path, page_of):
    random = np.random.default_rng(0)
    shape = (16, 60, 60)
    noise = random.uniform(-0.5, 1, shape)
    views = [
        CaseView(f"case_{n:03d}", noise, noise[::-1], noise[:, ::-1], SPACING_MM) for n in range(6)
    ]
    whole = len(report(tmp_path, views).encode())
    for limit in (whole // 2, whole // 12, whole // 60):
        text = report(tmp_path, views, largest_bytes=limit)
        assert len(text.encode()) <= limit
    shown = len(page_of(text).all("article"))
    assert shown < 6 and f"The first {shown} of 6 cases are shown" in text


def test_an_old_report_is_replaced_whole(tmp_path, page_of):
    report(tmp_path, [case("old")])
    assert "old" not in page_of(report(tmp_path, [case("new")])).text
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["report.html"]


def test_a_chart_is_shown_under_its_heading_with_the_sentence_that_explains_it(tmp_path, page_of):
    points = {"Bone": {"calibrated": np.array([[0.1, 0.1], [0.2, 0.3]])}}
    charts = {"Reliability": (reliability_figure(points), "Above the line <b> too sure.")}
    page = page_of(report(tmp_path, [], charts=charts))
    assert not page.open and not page.unbalanced
    assert "Reliability" in page.text and "Above the line <b> too sure." in page.text
    assert len(page.all("svg")) == 1
    (chart,) = page.all("div", "chart")
    assert chart["style"] == "max-width: 378px"  # 3.6 inches: a panel is not stretched to the page
