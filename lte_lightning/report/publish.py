"""A report's pictures and tables for a paper: SVG and PDF, CSV and LaTeX."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lte_lightning.errors import UserError
from lte_lightning.files import whole_file
from lte_lightning.report import pictures
from lte_lightning.report.sections import Section, safe
from lte_lightning.report.tables import Table

_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "≤": r"$\le$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "³⁰": r"\textsuperscript{30}",
    "∞": r"$\infty$",
}
_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


def publish(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Writes each picture as SVG and PDF, on white, and each table as CSV and as LaTeX (booktabs).

    Args:
        sections: Sections of the report.
        folder: The folder. It is created if missing; files of the same names are replaced.

    Returns:
        The files.

    Raises:
        UserError: If a file cannot be written.
    """
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in _files(sections):
            with whole_file(folder / name, "wb") as file:
                file.write(content)
            files.append(folder / name)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}; choose another --publish") from error
    return files


def _files(sections: Sequence[Section]) -> Iterator[tuple[str, bytes]]:
    uses: Counter[str] = Counter()
    for section in sections:
        for picture in section.pictures:
            for form in ("svg", "pdf"):
                yield f"{picture.name}.{form}", pictures.vector(picture.draw, form)
        for table in section.tables + section.folded:
            name = safe(table.name)
            uses[name] += 1
            name += f"-{uses[name]}" if uses[name] > 1 else ""
            yield f"{name}.csv", csv_of(table).encode()
            yield f"{name}.tex", latex_of(table).encode()


def csv_of(table: Table) -> str:
    """Returns a table as CSV, with the heads as its first row."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.heads, *table.rows])
    return text.getvalue()


def latex_of(table: Table) -> str:
    """Returns a table for LaTeX's package booktabs: text in the first column, right-aligned numbers in the others."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(_escaped, cells)) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(table.caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.heads) - 1)}}}",
            r"\toprule",
            line(table.heads),
            r"\midrule",
            *map(line, table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda match: _LATEX[match[0]], text)
