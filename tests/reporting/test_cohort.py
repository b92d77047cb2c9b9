import base64
import io
import re
from dataclasses import asdict
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from clinfuse.reporting.cohort import PlanePanel, PreparedCase, panels_of, write_cohort_report
from clinfuse.reporting.html import write_report

SHAPE, SPACING_MM = (16, 60, 48), (6.0, 3.0, 3.0)


def ellipsoid(radii_mm, centre_mm=(48.0, 90.0, 72.0)):
    places = (np.indices(SHAPE) + 0.5) * np.reshape(SPACING_MM, (3, 1, 1, 1))
    offset = (places - np.reshape(centre_mm, (3, 1, 1, 1))) / np.reshape(radii_mm, (3, 1, 1, 1))
    return (offset**2).sum(0) < 1


@pytest.fixture
def volumes():
    """Scalp, skull and brain, with a lesion on the patient's right (high w) and in front."""
    head, skull, brain = (ellipsoid(radii) for radii in ((47, 86, 68), (42, 78, 60), (36, 70, 52)))
    noise = np.random.default_rng(0).normal(0, 3, SHAPE)
    mri = np.select([brain, skull, head], [100.0, 20.0, 80.0], 0.0) + noise
    ct = np.select([brain, skull, head], [30.0, 900.0, 20.0], -1000.0) + noise
    return {
        "mri": mri.astype(np.float32),
        "ct": ct.astype(np.float32),
        "brain_mask": brain.astype(np.float32),
        "bone_mask": skull & ~brain,
        "lesion_mask": ellipsoid((12, 14, 14), (66.0, 120.0, 100.0)),
    }


def points_mm(path):
    """Vertices of an SVG path of relative lines."""
    points = []
    for part in re.findall(r"M([^l]+)l([^z]+)z", path):
        start, steps = (np.array(text.split(), int).reshape(-1, 2) for text in part)
        points.append(np.concatenate([start, start + np.cumsum(steps, axis=0)]) / 10)
    return np.concatenate(points)


def pixels(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


def report(tmp_path, cases, facts=None, **options):
    path = write_cohort_report(
        tmp_path / "out" / "q.html", "A cohort", cases, facts or {}, **options
    )
    return path.read_text("utf-8")


def case(volumes=None, case_id="case_000", verdict="pass", **changes):
    panels = None if volumes is None else panels_of(volumes, SPACING_MM)
    return PreparedCase(case_id, verdict, panels=panels, **changes)


def test_panels_show_three_planes_at_their_size_in_millimetres(volumes):
    panels = panels_of(volumes, SPACING_MM)
    assert [panel.plane for panel in panels] == ["axial", "coronal", "sagittal"]
    for panel in panels:
        for uri in (panel.mri, panel.ct):
            width, height = pixels(uri).size
            ratio = panel.columns_mm / panel.rows_mm
            assert width / height == pytest.approx(ratio, rel=0.02)
    axial, coronal, sagittal = panels
    assert axial.columns_mm == coronal.columns_mm and axial.rows_mm == sagittal.columns_mm
    assert coronal.rows_mm == sagittal.rows_mm
    assert [panel.slices for panel in panels] == [16, 60, 48]


def test_the_axial_slice_goes_through_the_lesion_and_else_through_the_largest_brain(volumes):
    areas = volumes["lesion_mask"].sum(axis=(1, 2))
    number = panels_of(volumes, SPACING_MM)[0].number
    assert areas[number - 1] == areas.max() > 0
    del volumes["lesion_mask"]
    areas = volumes["brain_mask"].sum(axis=(1, 2))
    number = panels_of(volumes, SPACING_MM)[0].number
    assert areas[number - 1] == areas.max()


def test_outlines_lie_where_the_masks_are(volumes):
    """Extents of the brain's outline are its diameters; the lesion is right and in front of it."""
    axial, coronal, sagittal = panels_of(volumes, SPACING_MM)
    inside = panels_of({**volumes, "lesion_mask": np.zeros(SHAPE, bool)}, SPACING_MM)[0]
    for panel, diameters_mm in ((inside, (104, 140)), (coronal, (104, 72)), (sagittal, (140, 72))):
        extent = np.ptp(points_mm(panel.outlines["brain"]), axis=0)
        np.testing.assert_allclose(extent, diameters_mm, atol=6)  # a voxel is 6 mm high
    lesion, brain = (points_mm(axial.outlines[name]) for name in ("lesion", "brain"))
    assert np.all(lesion.mean(axis=0) < (brain.min(axis=0) + brain.max(axis=0)) / 2)


def test_edges_of_the_ct_run_along_the_skull_and_move_with_it(volumes):
    skull = points_mm(panels_of(volumes, SPACING_MM)[0].outlines["bone"])
    edges = points_mm(panels_of(volumes, SPACING_MM)[0].ct_edges)
    np.testing.assert_allclose(np.ptp(edges, axis=0), np.ptp(skull, axis=0), atol=3)
    moved = {**volumes, "ct": np.roll(volumes["ct"], 3, axis=2)}  # 9 mm to the patient's right
    panel = panels_of(moved, SPACING_MM)[0]
    aside = points_mm(panel.ct_edges).min(axis=0) - points_mm(panel.outlines["bone"]).min(axis=0)
    np.testing.assert_allclose(aside, (-9, 0), atol=1.5)


def test_table_and_head_rest_have_no_edges(volumes):
    volumes["ct"][:, 1, 8:40] = 700.0
    for panel in panels_of(volumes, SPACING_MM)[:1]:
        skull = points_mm(panel.outlines["bone"])
        assert points_mm(panel.ct_edges)[:, 1].max() < skull[:, 1].max() + 3


def test_8_bit_ct_has_edges_too(volumes):
    window = np.clip((volumes["ct"] + 60) / 200, 0, 1) * 255
    panel = panels_of({**volumes, "ct": window.astype(np.float32)}, SPACING_MM)[0]
    skull = points_mm(panel.outlines["bone"])
    np.testing.assert_allclose(
        np.ptp(points_mm(panel.ct_edges), axis=0), np.ptp(skull, axis=0), atol=3
    )


def test_panels_keep_to_their_size(volumes):
    full = sum(panel.size_bytes for panel in panels_of(volumes, SPACING_MM))
    small = panels_of(volumes, SPACING_MM, largest_bytes=full // 3)
    assert sum(panel.size_bytes for panel in small) <= full // 3


def test_volumes_of_other_shapes_are_refused(volumes):
    with pytest.raises(ValueError, match=r"expected ct of shape .* got \(15, 60, 48\)"):
        panels_of({**volumes, "ct": volumes["ct"][1:]}, SPACING_MM)


def test_a_study_without_ct_or_without_contrast_is_shown_nevertheless(volumes, tmp_path, page_of):
    (panel, *_) = panels_of({"mri": volumes["mri"]}, SPACING_MM)
    assert panel.ct == panel.ct_edges == "" and panel.outlines == {}
    flat = panels_of({"mri": np.zeros(SHAPE, np.float32)}, SPACING_MM)
    text = report(tmp_path, [PreparedCase("flat", "fail", panels=flat)])
    assert "Checkerboard</" not in re.sub(r"<li>.*?</li>", "", text)
    assert len(page_of(text).all("image")) == 3


def test_panels_are_strings_and_numbers_that_can_be_kept(volumes):
    for panel in panels_of(volumes, SPACING_MM):
        assert PlanePanel(**asdict(panel)) == panel


def test_the_doubtful_come_first_then_names_in_order(tmp_path):
    cases = [case(case_id=name, verdict=verdict) for name, verdict in (
        ("b", "pass"), ("a", "pass"), ("d", "warn"), ("z", "fail"), ("c", "warn"),
    )]  # fmt: skip
    text = report(tmp_path, cases)
    assert re.findall(r"<h3>(\w)</h3>", text) == list("zcdab")
    assert re.findall(r'href="#case-\d">(\w)</a>', text) == list("zcdab")
    assert re.findall(r"(\d) (fail|warn|pass)</span>", text) == [
        ("1", "fail"), ("2", "warn"), ("2", "pass"),
    ]  # fmt: skip


def test_a_case_without_images_appears_with_its_sentence(tmp_path, page_of):
    sentence = "expected a NIfTI file, got something unreadable"
    text = report(tmp_path, [PreparedCase("case_007", "fail", (sentence,), {}, None)])
    page = page_of(text)
    assert text.count(sentence) == 2 and not page.all("image")  # in the table, and in its place
    assert "There are no images to show." in text


def test_the_summary_has_columns_for_facts_that_any_case_has(tmp_path):
    cases = [case(facts={"brain": "1300 ml"}), case(case_id="x", facts={"moved": "3.1 mm"})]
    text = report(tmp_path, cases)
    head = re.search(r"<thead>(.*?)</thead>", text, re.S)[1]
    assert re.findall(r">([^<]+)</th>", head) == ["case", "verdict", "reasons", "brain", "moved"]
    assert "<td>1300 ml</td><td>–</td>" in text


def test_what_is_so_in_every_case_is_said_once_above_the_summary(tmp_path):
    facts = {"registration": "rigid", "covered": "0.98"}  # of which the first is a column
    cases = [
        case(case_id=name, verdict="warn", reasons=reasons, facts={**facts, "brain": brain})
        for name, reasons, brain in (
            ("a", ("not in HU", "cut at the top"), "1300 ml"),
            ("b", ("not in HU",), "1200 ml"),
        )
    ]
    text = report(tmp_path, cases)
    assert "In every case: registration rigid; not in HU." in text
    head = re.search(r"<thead>(.*?)</thead>", text, re.S)[1]
    assert re.findall(r">([^<]+)</th>", head) == ["case", "verdict", "reasons", "brain"]
    assert re.findall(r'<td class="why">(.*?)</td>', text) == ["cut at the top", ""]
    assert text.count("<li>not in HU</li>") == 2  # and with each case, where its pictures are
    alone = report(tmp_path, cases[:1])
    assert "In every case" not in alone and '<td class="why">not in HU; cut' in alone


def test_both_pages_have_the_one_style_sheet(tmp_path):
    style = files("clinfuse.reporting").joinpath("style.css").read_text("utf-8").strip()
    run = write_report(tmp_path / "run.html", "A run", [], {}, {}).read_text("utf-8")
    assert style in report(tmp_path, [case()]) and style in run


def test_each_picture_is_stored_once_and_the_file_needs_nothing_else(volumes, tmp_path, page_of):
    counts, edges = np.array([3, 0, 7]), np.array([0.0, 1.0, 2.0, 3.0])
    text = report(
        tmp_path,
        [case(volumes, histograms={"CT (HU)": (counts, edges)}), case(volumes, "other", "warn")],
    )
    page = page_of(text)
    assert page.unbalanced == [] and page.open == []
    assert not page.all("script") and not page.all("link")
    images = page.all("image")
    assert len(images) == 2 * 3 * 2
    assert all(image["href"].startswith("data:image/png;base64,") for image in images)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for tag, a in page.elements if tag in ("a", "use")]
    assert links and {link.removeprefix("#") for link in links} <= set(ids)
    assert set(re.findall(r"url\(#([\w-]+)\)", text)) <= set(ids)
    outside = r"https?:|//[a-z]|@import|url\((?!#)"
    assert not re.search(outside, re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text))


def test_facts_and_the_warning_are_there_and_typed_text_is_no_markup(tmp_path):
    nasty = "<script>alert(1)</script>"
    shown = PreparedCase(nasty, "warn", (nasty,), {nasty: nasty}, None, {}, (nasty,))
    text = report(tmp_path, [shown], {"data set": nasty})
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "Research use only" in text and "data set" in text


def test_both_themes_define_every_colour(tmp_path):
    text = report(tmp_path, [case()])
    blocks = re.findall(
        r"(@media \(prefers-color-scheme: dark\) \{\s*)?:root \{(.*?)\}", text, re.S
    )
    light, dark = (
        {name for media, block in blocks if bool(media) == is_dark
         for name in re.findall(r"(--[\w-]+):", block)}
        for is_dark in (False, True)
    )  # fmt: skip
    used = set(re.findall(r"var\((--[\w-]+)\)", text)) - {"--columns", "--sans"}
    assert used <= light and used <= dark


def test_histograms_are_drawn_with_rare_values_in_sight(tmp_path):
    counts, edges = np.array([1, 100_000]), np.array([0.0, 1.0, 2.0])
    text = report(tmp_path, [case(histograms={"CT (HU)": (counts, edges)})])
    drawing = text[text.index('class="counted"') :]
    assert "CT (HU)" in drawing and "var(--accent)" in drawing


def test_a_cohort_without_cases_is_a_report_too(tmp_path):
    assert "There are no cases." in report(tmp_path, [])


def test_another_verdict_is_refused():
    with pytest.raises(ValueError, match=r"x: expected one of .*, got 'good'"):
        PreparedCase("x", "good")
