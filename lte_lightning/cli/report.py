"""``lte report``: a page of what sweeps and runs found."""

import argparse

from lte_lightning.errors import UserError
from lte_lightning.report.collect import collect
from lte_lightning.report.material import Material
from lte_lightning.report.page import write_report


def main(args: list[str]) -> None:
    """Runs the command; the path of the page is printed last.

    Raises:
        UserError: If a source cannot be reported, or the page cannot be written.
    """
    given = _parser().parse_args(args)
    if given.tolerance is not None and not given.tolerance >= 0:
        raise UserError(f"tolerance is {given.tolerance}; it must not be negative")
    material = _collect(given)
    title = given.title or f"Quality and sparsity: {', '.join(material.tasks)}"
    print(write_report(material, given.out, title, given.tolerance), flush=True)


def _collect(given: argparse.Namespace) -> Material:
    if given.tracking_uri is None and given.experiment is None:
        if not given.sources:
            raise UserError("nothing to report: name a sweep's folder or runs, or --experiment NAME (see --help)")
        return collect(given.sources, given.bench)
    from lte_lightning.report.tracked import collect_tracked  # MLflow, which takes its time

    return collect_tracked(given.tracking_uri, given.experiment, given.sources, given.bench)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lte report",
        description="Writes one self-contained HTML page, and its pictures as PNGs, about a sweep or any runs.",
        epilog="lte report runs/sweep-NAME --out report; or from MLflow: lte report --tracking-uri http://HOST:PORT "
        "--experiment sweep-NAME --out report",
        allow_abbrev=False,
    )
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="a sweep's folder, run folders, or folders of either; with --tracking-uri ids of MLflow runs, a sweep's "
        "for all of its fits",
    )
    parser.add_argument("--out", required=True, help="folder of the page")
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="report runs of this MLflow store, a server or sqlite:///mlflow.db, not folders (default with "
        "--experiment: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    parser.add_argument("--experiment", metavar="NAME", help="of MLflow: all of its finished fits are reported")
    parser.add_argument("--bench", nargs="+", default=[], metavar="CSV", help="what lte bench --csv wrote")
    parser.add_argument("--title", help="of the page")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="loss of the metric that counts as none (default: 0.5 for perplexity, 0.05 for ROUGE-L, else 0.01)",
    )
    return parser
