"""Reads the material of a report: runs, their sweeps, and benchmarks."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from lte_lightning.bench.rates import RATES_FILE, is_rates, read_rates
from lte_lightning.choices import options_by_name
from lte_lightning.documents import read_yaml
from lte_lightning.errors import UserError, meant_path
from lte_lightning.files import read_json, read_text
from lte_lightning.report.bench import read_bench
from lte_lightning.report.experiments import OLDER, settle
from lte_lightning.report.material import Material
from lte_lightning.report.methods import method_name
from lte_lightning.report.run import Run, Setting
from lte_lightning.report.sweeps import SweptFolder, read_swept
from lte_lightning.report.tested import tested
from lte_lightning.results import FILE, Results, read_results
from lte_lightning.store import read_run_file
from lte_lightning.sweep.folder import SWEEP_FILE
from lte_lightning.sweep.table import NO_CHOICE, newest

__all__ = ["Material", "Run", "Setting", "collect", "finish", "read_run"]

# What tells runs apart without being a choice of theirs
NO_PARAMETER = (*NO_CHOICE, "weights_only", "model.init_from", "data.tokenizer")


def collect(sources: Iterable[str | Path], bench: Iterable[str | Path] = ()) -> Material:
    """Reads sweep folders, run folders, folders of runs or of sweeps, and CSV files of ``lte bench``.

    Raises:
        UserError: If a source is none of these, holds no finished run, or was written by another version.
    """
    _configured.cache_clear()  # files may have changed
    material, sweeps, read_already = Material(), {}, set()
    for source in sources:
        path = Path(source).absolute()
        if not path.is_dir():
            raise UserError(
                f"there is no folder {source}{meant_path(source)}; give a sweep's folder, or folders of runs; ids of "
                "MLflow runs are read with --tracking-uri"
            )
        for folder in sorted(file.parent for file in path.rglob(SWEEP_FILE)):
            if folder not in sweeps:
                sweeps[folder] = swept = read_swept(folder)
                material.missing += swept.missing
                material.typed += swept.typed
                material.about += [swept.text] if swept.text and swept.text not in material.about else []
        files = [path / FILE] if (path / FILE).exists() else sorted(path.rglob(FILE))
        runs = [file.parent for file in files if (file.parent / "run.json").exists()]
        if not runs:
            raise UserError(f"{source} holds no finished run (a folder with run.json and results.json)")
        for run in runs:
            if run.parent not in sweeps and (run.parent / SWEEP_FILE).exists():  # one run of a sweep was named
                sweeps[run.parent] = read_swept(run.parent)
        material.runs += _read([run for run in runs if run not in read_already], sweeps, material)
        read_already |= set(runs)
    return finish(material, bench)


def finish(material: Material, bench: Iterable[str | Path]) -> Material:
    """Groups the runs of a report into experiments and settings, and adds the benchmarks.

    Raises:
        UserError: If no run counts, or a benchmark cannot be read.
    """
    if not material.runs:
        name, reason = material.left_out[0]
        raise UserError(f"none of the runs counts: {name} is {reason}; start the sweep again, or name others")
    material.runs += [other for run in material.runs for other in tested(run)]
    settle(material)
    beside = [file for run in material.runs if (file := run.folder / RATES_FILE).is_file()]
    for path in dict.fromkeys((*map(Path, bench), *beside)):
        if is_rates(path):
            material.rates += read_rates(path)
            continue
        rows = read_bench(path)
        if "setting" in rows[0]:
            material.curves[str(path)] = rows
        else:
            material.bench += rows
    return material


def _read(folders: list[Path], sweeps: dict[Path, SweptFolder], material: Material) -> list[Run]:
    """Reads run folders. If a sweep's point has several runs, only the newest counts."""
    alone = [folder for folder in folders if folder.parent not in sweeps]
    points: dict[tuple[Path, Any], list[Path]] = {}
    for folder in folders:
        if swept := sweeps.get(folder.parent):
            name = read_run_file(folder).get("name")
            if reason := swept.left_out(name):
                material.left_out.append((name or folder.name, reason))
            else:
                points.setdefault((swept.path, name), []).append(folder)
    read = [read_run(folder) for folder in alone]
    # Run folders have random names, so the sweep's file gives the order
    order = [(path, name) for path, swept in sweeps.items() for name in swept.points]
    for path, name in sorted(points, key=order.index):
        *older, latest = sorted(points[path, name], key=newest)
        material.left_out += [(folder.name, OLDER) for folder in older]
        point = sweeps[path].points[name]
        role, variant, parameters = (point.role, point.variant, point.parameters) if point else (None, None, None)
        read.append(read_run(latest, role, variant, parameters, sweeps[path].commands.get(name)))
    return read


def read_run(
    folder: Path,
    role: str | None = None,
    variant: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Run:
    """Reads a run folder.

    Args:
        folder: With ``run.json``, ``results.json``, ``config.yaml`` and ``model/lte_config.json``; the last two may
            be missing.
        role: Its role in the sweep; a run outside of sweeps takes it from its model.
        variant: The sweep's variant.
        parameters: The parameters that distinguish it from the variant's other points.
        command: The command that ran it, if recorded.

    Raises:
        UserError: If the folder is damaged, or was written by another version.
    """
    run_file, results = read_run_file(folder), read_results(folder)
    model, options = _json(folder / "model" / "lte_config.json"), _options(folder, results)
    measured = model.get("about", {}).get("measured", {})
    views = measured.get("hard") or measured.get("hard_before") or {}
    lte_options = {
        key.removeprefix("model.lte."): value for key, value in options.items() if key.startswith("model.lte.")
    }
    lte = model.get("lte") or {"selector": "router"} | lte_options
    lte = lte | {"description": model.get("selector")}
    dense = results.sparsity is None and not results.expert_stage_ran
    role = role or ("floor" if lte.get("selector") == "none" else "start" if dense else "point")
    # A variant may have the name of its task (selectors then name the methods), or begin with it
    variant = None if variant == results.task else variant and variant.removeprefix(f"{results.task}: ")
    return Run(
        folder=folder,
        name=run_file.get("name"),
        method=variant or method_name(lte),
        role=role,
        parameters=dict(parameters or {}),
        results=results,
        histogram=views.get("score_histogram", []),
        command=command or f"lightning fit --config {folder}/config.yaml",
        options=options,
        lte=lte,
        family=model.get("model_type"),
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, UserError):
        return {}


def _options(folder: Path, results: Results) -> dict[str, Any]:
    """Returns a run's options by name, and with ``start.`` those of the fit that it starts from, as far as known."""
    known = results.options
    if known is None:  # of an earlier version, or fitted without a configuration
        known = _configured(folder)
        origin = Path(str(known.get("model.init_from") or ""))
        start = _configured(folder.parent / origin.parent.name) if origin.name == "model" else {}
        known = known | {f"start.{key}": value for key, value in start.items()}
    return {key: value for key, value in known.items() if _is_choice(key.removeprefix("start."))}


def _is_choice(key: str) -> bool:
    return not key.startswith(NO_PARAMETER) and not key.endswith(".seed")


@lru_cache(maxsize=512)
def _configured(folder: Path) -> dict[str, Any]:
    try:
        text = read_text(folder / "config.yaml")
        return options_by_name(read_yaml(text))
    except (UserError, yaml.YAMLError, ValueError, AttributeError):
        return {}
