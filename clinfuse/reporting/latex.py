"""The tables of a paper for LaTeX, which needs booktabs and nothing else; and its figures."""

import io
import re
import string
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from clinfuse.reporting.paper import Entry, Panel, PaperTable

MOST_LINES = 48
"""Lines of a table that a printed page has room for."""


def latex(table: PaperTable, label: str) -> str:
    """A table for LaTeX: ``table*`` with booktabs, one a page's worth of panels.

    What lacks cases has a letter, which its notes explain.

    Args:
        table: what to print.
        label: ``\\label{tab:LABEL}``, with a number from the second page on.
    """
    pages: list[list[Panel]] = []
    used = MOST_LINES
    for panel in table.panels:
        lines = len(panel.lines) + 2
        if used + lines > MOST_LINES:
            pages.append([])
            used = 0
        pages[-1].append(panel)
        used += lines
    return "\n".join(
        _latex_page(table, page, label + (f"-{number}" if number > 1 else ""), number > 1)
        for number, page in enumerate(pages, 1)
    )


def _latex_page(table: PaperTable, panels: Sequence[Panel], label: str, is_continued: bool) -> str:
    width = max(len(panel.columns) for panel in panels)
    letters: dict[str, str] = {}
    body: list[str] = []
    for panel in panels:
        body += [r"\midrule"] if body else [r"\toprule"]
        if panel.title:
            span = f"\\multicolumn{{{1 + 2 * width}}}{{@{{}}l}}"
            body += [f"{span}{{\\textit{{{latex_text(panel.title)}}}}} \\\\"]
        heads = [f"\\multicolumn{{2}}{{c}}{{{latex_text(c.header)}}}" for c in panel.columns]
        body += [_latex_line(["method", *heads], width), r"\midrule"]
        for method, line in panel.lines.items():
            if method == table.ours and len(panel.lines) > 1:
                body.append(r"\addlinespace")
            cells = [_latex_entry(entry, letters) for entry in line]
            body.append(_latex_line([latex_text(method), *cells], width))
    body.append(r"\bottomrule")
    notes = [f"$^{{{letter}}}$ {latex_text(note)}." for note, letter in letters.items()]
    notes += [latex_text(note) for note in table.notes]
    caption = "Continued: " * is_continued + " ".join(table.caption)
    return "\n".join(
        [
            r"\begin{table*}[tbp]",
            r"\centering",
            r"\setlength{\belowcaptionskip}{6pt}",
            f"\\caption{{{latex_text(caption)}}}",
            f"\\label{{tab:{latex_label(label)}}}",
            r"\footnotesize",
            f"\\begin{{tabular}}{{@{{}}l*{{{width}}}{{r@{{\\,}}l}}@{{}}}}",
            *body,
            r"\end{tabular}",
            r"\par\smallskip",
            f"\\begin{{minipage}}{{\\linewidth}}\\footnotesize {' '.join(notes)}\\end{{minipage}}",
            r"\end{table*}",
            "",
        ]
    )


def _latex_line(cells: Sequence[str], width: int) -> str:
    """A line of a tabular; each missing column of numbers is two empty cells."""
    missing = 2 * (width + 1 - len(cells))
    return " & ".join([*cells, *[""] * missing]).rstrip() + r" \\"


def _latex_entry(entry: Entry, letters: dict[str, str]) -> str:
    """Two cells: the mean, and what follows it."""
    cell = entry.cell
    mean = latex_text(cell.mean)
    mean = f"\\textbf{{{mean}}}" if cell.is_best else mean
    mean = f"\\underline{{{mean}}}" if cell.is_second else mean
    half = f"$\\pm$ {cell.half_width}" if cell.half_width else ""
    raised = [entry.sign.replace("−", "-")] if entry.sign else []
    if cell.note:
        raised.append(letters.setdefault(cell.note, _letter(len(letters))))
    above = r"\,".join(raised)
    return f"{mean} & {half}" + (f"$^{{{above}}}$" if raised else "")


def _letter(number: int) -> str:
    """a to z, then aa, ab and so on."""
    many, one = divmod(number, 26)
    return (_letter(many - 1) if many else "") + string.ascii_lowercase[one]


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",  # after a line's end it would be an option
    "]": "{]}",
    "*": "{*}",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "°": r"$^{\circ}$",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "∞": r"$\infty$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\rightarrow$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "µ": r"$\mu$",
    "μ": r"$\mu$",  # Greek, the one before a prefix
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "δ": r"$\delta$",
    "ε": r"$\epsilon$",
    "η": r"$\eta$",
    "κ": r"$\kappa$",
    "λ": r"$\lambda$",
    "ν": r"$\nu$",
    "π": r"$\pi$",
    "ρ": r"$\rho$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
}


def latex_text(text: str) -> str:
    """Text as LaTeX prints it, whatever it holds, in captions and in cells.

    Letters of Latin-1 stay, which LaTeX has read as UTF-8 since 2018; a character that it may not
    know is written by its number.
    """
    return "".join(map(_latex_character, " ".join(text.split())))


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii():
        return character if character.isprintable() else ""
    is_letter = ord(character) < 0x180 and character.isalpha()
    return character if is_letter else f"U+{ord(character):04X}"


def latex_label(name: str) -> str:
    """A name that ``\\ref`` can take: what it cannot becomes a hyphen."""
    return re.sub(r"[^A-Za-z0-9:.-]+", "-", name).strip("-") or "table"


def figure_pdf(figure: Figure) -> bytes:
    """The figure as a PDF whose text is text; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    return buffer.getvalue()
