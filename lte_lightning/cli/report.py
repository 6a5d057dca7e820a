"""``lte report``: a page about sweeps and runs."""

from pathlib import Path

from lte_lightning.errors import UserError
from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command; the path of the page is printed last.

    Raises:
        UserError: If a source cannot be reported, or the page cannot be written.
    """
    call(report, "lte report", args, positional={"sources": "RUN"})


def report(
    out: str,
    sources: list[str] = [],  # noqa: B006  # a command line makes its own
    tracking_uri: str | None = None,
    experiment: str | None = None,
    bench: list[str] = [],  # noqa: B006
    title: str | None = None,
    tolerance: float | None = None,
    publish: Path | None = None,
) -> None:
    """Writes one self-contained HTML page, and its pictures as PNGs, about a sweep or any runs.

    lte report runs/sweep-NAME --out report; or from MLflow: lte report --tracking-uri http://HOST:PORT --experiment
    sweep-NAME --out report

    Args:
        out: Folder of the page.
        sources: Sweep folders, run folders, or folders that contain them. With --tracking-uri, ids of MLflow runs; the
            id of a sweep stands for all of its fits.
        tracking_uri: Read the runs from this MLflow store (a server's address or sqlite:///mlflow.db), not from
            folders. By default, with --experiment, MLFLOW_TRACKING_URI or sqlite:///mlflow.db.
        experiment: MLflow experiment, whose finished fits are all reported.
        bench: Tables (.csv) of lte bench --csv or lte curve.
        title: Title of the page.
        tolerance: Largest drop of the metric that still counts as no loss. By default 0.5 for perplexity, 0.05 for
            ROUGE-L, else 0.01.
        publish: Write each picture as SVG and PDF and each table as CSV and LaTeX into this folder, too.

    Raises:
        UserError: If a source cannot be reported, or the page cannot be written.
    """
    if tolerance is not None and not tolerance >= 0:
        raise UserError(f"--tolerance is {tolerance}; it must not be negative")
    if tracking_uri is None and experiment is None:
        if not sources:
            raise UserError("nothing to report: name a sweep's folder or runs, or --experiment NAME (see --help)")
        from lte_lightning.report.collect import collect

        material = collect(sources, bench)
    else:
        from lte_lightning.report.tracked import collect_tracked  # MLflow is slow to import

        material = collect_tracked(tracking_uri, experiment, sources, bench)
    from lte_lightning.report.page import write_report

    heading = title or f"Quality and sparsity: {'; '.join(map(material.title, material.tasks))}"
    print(write_report(material, out, heading, tolerance, publish), flush=True)
