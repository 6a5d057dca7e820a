"""Writes results to a CSV file, a picture and an MLflow experiment."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError


def begin_mlflow(experiment: str) -> None:
    """Selects the MLflow experiment, before anything is measured.

    Raises:
        UserError: If the server cannot be reached or refuses.
    """
    import mlflow

    from lte_lightning.network import try_store
    from lte_lightning.store import mlflow_store, reason, shown

    uri = mlflow_store(os.environ.get("MLFLOW_TRACKING_URI"))
    try:
        try_store(uri)
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment)
    except (mlflow.MlflowException, UserError) as error:
        raise UserError(f"MLflow at {shown(uri)} cannot be used: {reason(error)}") from None


def write(
    timings: Any, csv: Path | None, picture: Path | None, options: dict[str, Any], draw: "Callable[[Any, Path], None]"
) -> None:
    """Writes the CSV file and the picture, and logs them in the MLflow experiment if one was named."""
    from lte_lightning.bench.output import write_table
    from lte_lightning.network import failures
    from lte_lightning.store import reason

    with tempfile.TemporaryDirectory() as passing:  # for files that only MLflow keeps
        table = csv or (Path(passing) / "bench.csv" if options["mlflow"] else None)
        picture = picture or (table.with_suffix(".png") if table else None)
        if table:
            write_table(timings, table)
        if picture:
            draw(timings, picture)
        written = [path for path in (table, picture) if path]
        if options["mlflow"]:
            import mlflow

            try:
                with mlflow.start_run(run_name=f"bench {options['shape']}"):
                    mlflow.log_params({key: str(value) for key, value in options.items()})
                    for path in written:
                        mlflow.log_artifact(str(path))
            except failures() as error:
                raise UserError(f"MLflow did not accept the results: {reason(error)}") from None
        named = [str(path) for path in written if path.parent != Path(passing)]
    if named:
        print(f"\nwritten: {', '.join(named)}")
