"""The tables that a sweep writes: what is averaged, and what is not."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from lte_lightning.results import read_results
from lte_lightning.sweep.spec import read_sweep
from lte_lightning.sweep.table import write_tables

ETA = "model.efficiency_weight"


def cells(file: Path, *heads: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in file.read_text().splitlines() if line]
    return [[line[lines[0].index(head)] for head in heads] for line in lines[2:]]


def tables_of(bench, swept):
    return write_tables(swept.folder, read_sweep(bench.file).points())


def change(swept, start, **figures):
    """Writes other figures for the points whose names begin so."""
    for name, (run,) in swept.folder.attempts().items():
        if name.startswith(start):
            file = run / "results.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | figures))


def test_starts_that_differ_are_not_averaged(bench):
    """Nor are their floors, whose own options are the same."""
    variants = {"LTE": {}, "MoEfication": {"start": {"overrides": {"model.activation": "relu"}}}}
    mine = bench(seeds=[0, 1], start={}, floor={}, variants=variants)
    swept = mine.run()
    table = tables_of(mine, swept)[1]
    assert cells(table, "variant", "seeds")[:4] == [
        ["start (activation as configured)", "0, 1"],
        ["start (activation relu)", "0, 1"],
        ["floor (activation as configured)", "0, 1"],
        ["floor (activation relu)", "0, 1"],
    ]
    # points of other seeds, of which only what the folder remembers is known
    points = [
        replace(p, configs=(), overrides={}, identity="") if p.seed else p for p in read_sweep(mine.file).points()
    ]
    write_tables(swept.folder, points)
    assert [seeds for (seeds,) in cells(table, "seeds")] == ["0, 1"] * 6
    alone = bench(seeds=[0], start={})
    (alone.cwd / "runs").rename(alone.cwd / "first")
    assert cells(tables_of(alone, alone.run())[1], "variant", "dense") == [["start", "0.9000"], ["fit", "0.9000"]]


def test_an_undefined_figure_is_no_figure(bench):
    mine = bench(seeds=[0, 1], variants={"A": {}, "B": {"overrides": {"stages.expert.epochs": "0"}}})
    swept = mine.run()
    change(swept, "A-s1", hard=None, hard_before=0.8, seconds_per_stage={"expert": 1.0})
    change(swept, "B", hard_before=0.8)
    files = tables_of(mine, swept)
    assert cells(files[1], "variant", "hard before", "hard") == [
        ["A", "0.8000", "undefined in 1 of 2"],
        ["B", "0.8000 ± 0.0000", "–"],
    ]
    with files[0].open() as file:
        assert [row["hard"] for row in csv.DictReader(file)] == ["0.85", "nan", "", ""]
    runs = {name.rpartition("-")[0]: read_results(run) for name, (run,) in swept.folder.attempts().items()}
    assert [runs[name].value for name in ("A-s0", "A-s1", "B-s0")] == [0.85, None, 0.8]
    assert "hard undefined" in runs["A-s1"].describe()
    assert "hard_before 0.8000" in runs["B-s0"].describe()


def test_the_span_is_of_what_the_fit_has_come_to(bench):
    mine = bench(seeds=[0, 1], floor={}, overrides={"stages.expert.epochs": "0"})
    swept = mine.run()
    change(swept, "fit-s0", hard_before=0.7)
    change(swept, "fit-s1", hard_before=0.7, floor=0.95)
    kept = cells(tables_of(mine, swept)[1], "variant", "span kept, of the dense start")
    assert kept[-1] == ["fit", "50 % (1 of 2 seeds)"]


def test_the_newest_run_of_a_point_is_in_the_table(bench):
    mine = bench()
    swept = mine.run()
    ((run,),) = swept.folder.attempts().values()
    again = shutil.copytree(run, run.with_name("typed-again"))
    replace(read_results(run), hard=0.5).write(again / "results.json")
    for folder, seconds in ((run, 1000), (again, 2000)):
        for file in folder.iterdir():
            os.utime(file, (seconds, seconds))
    assert cells(tables_of(mine, swept)[1], "seeds", "hard") == [["0", "0.5000"]]


def test_the_first_variant_is_compared_with_the_others(bench):
    dense = {"overrides": {"model.lte.target_sparsity": 0.0}}
    mine = bench(seeds=[0, 1, 2], variants={"A": {}, "B": {}, "dense": dense, "far": {}})
    swept = mine.run()
    for seed, value in enumerate((0.80, 0.81, 0.82)):
        change(swept, f"A-s{seed}", hard=value, sparsity=0.8)
        change(swept, f"B-s{seed}", hard=value - 0.05, sparsity=0.79)
        change(swept, f"far-s{seed}", hard=0.5, sparsity=0.7)
        change(swept, f"dense-s{seed}", hard=0.81, sparsity=0.0)
    table = tables_of(mine, swept)[2]
    assert table.name == "differences.md"
    assert cells(table, "value of", "minus that of", "seeds", "difference, 95 % interval") == [
        ["A (80.0 %)", "B (79.0 %)", "3", "+0.0500 (+0.0500 to +0.0500, seeds): better"],
        ["A (80.0 %)", "dense (0.0 %)", "3", "+0.0000 (-0.0248 to +0.0248, seeds): not told apart"],
    ]


def test_one_method_alone_has_nothing_to_be_compared_with(bench):
    mine = bench(seeds=[0], variants={"LTE": {}})
    swept = mine.run()
    assert [file.name for file in tables_of(mine, swept)] == ["table.csv", "table.md"]
