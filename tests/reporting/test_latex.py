import re
import shutil
import subprocess

import numpy as np
import pytest

from clinfuse.reporting.figures import robustness_figure
from clinfuse.reporting.latex import MOST_LINES, figure_pdf, latex, latex_label, latex_text
from clinfuse.reporting.paper import paper_table
from clinfuse.reporting.rows import case_rows
from clinfuse.reporting.tables import HEADLINE_SCORES, headline

STRANGE = r"""[a]_b & 50% #1 {x}^2 ~$y$ \z <"|"> *† naïve 中 κ=½"""
"""All that is special to LaTeX, at the beginning of a line too, and some that its fonts lack."""


def rows_of(values, amplitudes=(0.0,), scores=HEADLINE_SCORES):
    key = {"preset": "default", "mask_source": "expert", "steps": 0, "seed": 0}
    return [
        row
        for method, level in values.items()
        for mm in amplitudes
        for case, shift in zip("abcdefg", np.linspace(0, 1, 7), strict=True)
        for row in case_rows(
            [(*score, level + shift) for score in scores],
            case_id=case, method=method, misregistration_mm=mm, **key,
        )
    ]  # fmt: skip


@pytest.fixture
def compiled(tmp_path):
    """Sets a text with pdflatex, booktabs alone loaded; the log."""
    program = shutil.which("pdflatex")
    if program is None or not shutil.which("kpsewhich"):
        pytest.skip("pdflatex is not installed")
    if not subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).stdout:
        pytest.skip("the LaTeX package booktabs is not installed")

    def compiled(text):
        document = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
        (tmp_path / "a.tex").write_text(document + text + "\\end{document}\n")
        command = [program, "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        return done.stdout

    return compiled


def lines_of(text):
    body = text.split(r"\begin{tabular}")[1].split(r"\end{tabular}")[0]
    return [line for line in body.splitlines() if line.endswith(r"\\")]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("mask_composite", r"mask\_composite"),
        ("50% & #1 {x} $", r"50\% \& \#1 \{x\} \$"),
        (r"~^\ ", r"\textasciitilde{}\textasciicircum{}\textbackslash{}"),
        ("<a|b>", r"\textless{}a\textbar{}b\textgreater{}"),
        ("[5] *", "{[}5{]} {*}"),
        ("α ± ∞ – −1 µm ↓", r"$\alpha$ $\pm$ $\infty$ -- $-$1 $\mu$m $\downarrow$"),
        ("naïve 中\n\tb\x07", "naïve U+4E2D b"),
    ],
)
def test_text_is_escaped_for_latex(text, expected):
    assert latex_text(text) == expected


def test_a_label_is_what_ref_can_take():
    assert latex_label("my table_1/β") == "my-table-1" and latex_label("%%") == "table"


def test_every_line_fills_its_columns_and_nothing_stays_open():
    rows = rows_of({"a": 1.0, "ours": 3.0, STRANGE: 2.0}, (0.0, 2.0))
    rows = [row for row in rows if (row["metric"], row["misregistration_mm"]) != ("psnr", 2.0)]
    text = latex(paper_table(rows, "quality", "Quality", HEADLINE_SCORES, "ours"), "x")
    for line in lines_of(text):
        cells = re.sub(r"\\&", "", line).count("&") + 1
        cells += sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
        assert cells == 5  # methods and two amplitudes of two cells; bone PSNR has one of them
    unescaped = re.sub(r"\\[{}\\]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    assert re.findall(r"\\begin\{(\w+\*?)\}", text) == ["table*", "tabular", "minipage"]
    assert re.findall(r"\\end\{(\w+\*?)\}", text) == ["tabular", "minipage", "table*"]


def test_the_best_is_bold_the_second_underlined_and_signs_are_raised():
    values = {"far": 1.0, "near": 2.8, "ours": 3.0}
    text = latex(paper_table(rows_of(values), "quality", "Quality", HEADLINE_SCORES, "ours"), "x")
    head, far, near, ours = lines_of(text)
    assert head.startswith(r"method & \multicolumn{2}{c}{Bone PSNR (dB) $\uparrow$} & ")
    # Seven patients all of one sign: p = 2 / 2^7, of two methods 0.03.
    assert re.match(r"far & 1\.5 & \$\\pm\$ 0\.\d\$\^\{\+\}\$ &", far)
    assert re.match(r"near & \\underline\{3\.3\} & \$\\pm\$ 0\.\d\$\^\{\+\}\$ &", near)
    assert re.match(r"ours & \\textbf\{3\.5\} & \$\\pm\$ 0\.\d &", ours)
    assert r"\label{tab:x}" in text and r"\addlinespace" in text


def test_what_lacks_cases_has_a_letter_that_the_notes_explain():
    rows = rows_of({"a": 1.0, "b": 2.0, "c": 3.0}, scores=[("bone", "psnr")])
    for row in rows:
        if row["method"] == "b" and row["case_id"] in "ab":
            row["value"] = float("nan")
    text = latex(paper_table(rows, "quality", "Quality", HEADLINE_SCORES, "c"), "x")
    _, a, b, _ = lines_of(text)
    assert re.search(r"\^\{\+?=?\\,a\}", b) and ",a}" not in a
    assert "$^{a}$ n 5, 2 undefined." in text
    assert "Undefined values, left out of means: 2 (Bone PSNR (dB) 2)." in text


def test_a_table_longer_than_a_page_goes_on_in_a_second_one():
    rows = rows_of({f"method {number}": float(number) for number in range(20)}, (0.0, 1.0))
    text = latex(paper_table(rows, "quality", "Quality", HEADLINE_SCORES), "x")
    assert re.findall(r"\\label\{(.*?)\}", text) == ["tab:x", "tab:x-2"]
    assert text.count(r"\caption{Continued: Quality") == 1
    pages = text.split(r"\end{table*}")[:2]
    assert all(len(lines_of(page)) <= MOST_LINES for page in pages)
    assert sum(page.count("method 13 &") for page in pages) == 3


def test_latex_sets_a_table_whatever_its_methods_are_called(compiled):
    rows = rows_of({STRANGE: 1.0, "[b]": 2.0, "*": 3.0, "-- ?` %": 4.0, "ours_1": 5.0}, (0.0, 2.0))
    origin = [f"Data: {STRANGE}."]
    table = paper_table(rows, "quality", STRANGE, HEADLINE_SCORES, "ours_1", origin)
    log = compiled(latex(table, STRANGE))
    assert "Output written on a.pdf" in log and "Missing character" not in log


def test_a_figure_is_a_pdf_and_the_same_twice():
    table = headline(rows_of({"a": 1.0, "b": 2.0}, (0.0, 2.0)))
    first, second = (figure_pdf(robustness_figure(table, "a")) for _ in range(2))
    assert first.startswith(b"%PDF-") and first == second
