"""Writes a report: one self-contained HTML page, and its pictures as PNG files."""

import os
import platform
import re
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from lte_lightning.errors import UserError
from lte_lightning.report import tables, words
from lte_lightning.report.material import Material
from lte_lightning.report.pictures import MADE_BY
from lte_lightning.report.publish import publish
from lte_lightning.report.sections import detail_sections, main_sections, names_of_runs
from lte_lightning.report.tables import Table

# File names of a report's pictures
OURS = re.compile(r"(quality|flops|speed|span|layers|scores|union|latency|curve|engines)-.*\.png")


def write_report(
    material: Material, out: str | Path, title: str, tolerance: float | None = None, print_to: Path | None = None
) -> Path:
    """Writes ``index.html`` and the pictures into a folder, and removes only the pictures of an earlier report.

    Args:
        material: The material to report.
        out: The folder; it is created if missing.
        title: Title of the page.
        tolerance: Tolerated loss of the metric in the FLOPs table; by default the paper's for perplexity (0.5) and
            ROUGE-L (0.05), and 0.01 for other metrics.
        print_to: A folder for pictures and tables in formats for a paper, see `publish`.

    Returns:
        The page.

    Raises:
        UserError: If the folder cannot be written.
    """
    sections, details = main_sections(material, tolerance), detail_sections(material)
    page = (
        words.environment(markup=True)
        .get_template("page.html")
        .render(
            title=title,
            about=material.about,
            summary={material.title(task): tables.summary(material, task, tolerance) for task in material.tasks},
            not_run=tables.not_run(material),
            sections=sections,
            details=details,
            commands=list(zip(names_of_runs(material.fits), [run.command for run in material.fits], strict=True)),
            typed=material.typed,
            versions=tables.versions(material),
            here=_writer_versions(),
            written=time.strftime("%Y-%m-%d"),
        )
    )
    pictures = {f"{picture.name}.png": picture.light for section in sections + details for picture in section.pictures}
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # write everything first, then replace the earlier report
        with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as staging:
            for name, content in pictures.items():
                Path(staging, name).write_bytes(content)
            Path(staging, "index.html").write_text(page, encoding="utf-8")
            for name in [*pictures, "index.html"]:
                os.replace(Path(staging, name), out / name)
        _remove_old(out, pictures)
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error}; choose another --out") from error
    if print_to is not None:
        publish(sections + details, print_to)
    return out / "index.html"


def _remove_old(out: Path, keep: Iterable[str]) -> None:
    """Removes pictures of an earlier report: those with a name and a mark of ours."""
    for file in out.glob("*.png"):
        if file.name not in keep and OURS.fullmatch(file.name) and file.is_file() and not file.is_symlink():
            with file.open("rb") as content:
                made_by_us = f"Software\0{MADE_BY}".encode() in content.read(200)
            if made_by_us:
                file.unlink()


def _writer_versions() -> Table:
    """Returns the versions and the machine that write the page, which may differ from those of the runs."""
    names = ("lte-lightning", "matplotlib", "numpy")
    system = [["system", platform.platform(terse=True)], ["machine", platform.machine()]]
    rows = [["python", platform.python_version()], *([name, version(name)] for name in names), *system]
    return Table(["", "here"], rows, "Versions and machine that wrote this page")
