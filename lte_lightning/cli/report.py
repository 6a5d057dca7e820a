"""``lte report``: a page of what sweeps and runs found."""

import argparse

from lte_lightning.core.errors import UserError
from lte_lightning.report.collect import collect
from lte_lightning.report.page import write_report


def main(args: list[str]) -> None:
    """Runs the command; the path of the page is printed last.

    Raises:
        UserError: If a source cannot be reported, or the page cannot be written.
    """
    given = _parser().parse_args(args)
    if given.tolerance is not None and not given.tolerance >= 0:
        raise UserError(f"tolerance is {given.tolerance}; it must not be negative")
    material = collect(given.sources, given.bench)
    title = given.title or f"Quality and sparsity: {', '.join(material.tasks)}"
    print(write_report(material, given.out, title, given.tolerance), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lte report",
        description="Writes one self-contained HTML page, and its pictures as PNGs, about a sweep or any runs.",
        allow_abbrev=False,
    )
    parser.add_argument("sources", nargs="+", help="a sweep's folder, run folders, or folders of runs")
    parser.add_argument("--out", required=True, help="folder of the page")
    parser.add_argument("--bench", nargs="+", default=[], metavar="CSV", help="what lte bench --csv wrote")
    parser.add_argument("--title", help="of the page")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="loss of the metric that counts as none (default: 0.5 for perplexity, 0.05 for ROUGE-L, else 0.01)",
    )
    return parser
