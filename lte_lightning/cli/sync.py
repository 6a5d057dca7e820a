"""``lte sync``: sends records to MLflow that failed to upload during a fit."""

import argparse
from pathlib import Path

from lte_lightning.recording.unsent import sync


def main(args: list[str]) -> int:
    """Sends the waiting data of run folders."""
    for run in _parser().parse_args(args).runs:
        count = sync(Path(run).absolute())
        print(f"{run}: {count} entries sent" if count else f"{run}: nothing waits")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lte sync",
        description="Sends metrics, parameters and files to MLflow that failed to upload during a fit.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    return parser
