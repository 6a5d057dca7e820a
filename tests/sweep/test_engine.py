"""What is run, in which order, what is left after a failure or a kill, and what the next sweep does."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lte_lightning.errors import UserError
from lte_lightning.sweep.command import sweep_options
from lte_lightning.sweep.engine import Engine
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.local import LocalRunner, cores
from lte_lightning.sweep.spec import read_sweep
from lte_lightning.sweep.table import write_tables

ETA = "model.efficiency_weight"


def until(condition, seconds=120):
    """Waits until something is so, and returns it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail("it never came to that")
        time.sleep(0.02)
    return found


def statuses(folder):
    return {file.name.split("-s")[0]: json.loads(file.read_text())["status"] for file in folder.points.glob("*.json")}


def test_a_wanted_number_of_threads_is_kept(bench, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "threads 3\n" in bench(seeds=[0]).run(workers=2).log("")


def test_every_point_is_run_once_after_what_it_needs(bench, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    trial = bench(seeds=[0, 1], start={}, floor={}, grid={ETA: [0.1, 0.5]})
    swept = trial.run(workers=2)
    assert len(swept.summary.done) == 2 + 2 + 4
    assert (swept.summary.failed, swept.summary.blocked) == ({}, [])
    assert [re.match(r"\[(\d+)/8\]", line)[1] for line in swept.said] == [str(i) for i in range(1, 9)]
    left = [int(re.search(r"(\d+) left$", line)[1]) for line in swept.said]
    assert left == list(range(7, -1, -1))
    (line,) = (line for line in swept.said if "efficiency_weight=0.5-s1" in line)
    assert "accuracy: dense 0.9100, hard 0.8600, sparsity 33.3 %" in line
    runs = swept.folder.attempts()
    for name, point in swept.engine.points.items():
        (run,) = runs[name]
        given = json.loads((run / "config.yaml").read_text())
        if point.role == "point":
            assert given["--model.init_from"] == f"runs/trial/{runs[point.start][0].name}/model"
            assert given["--run.floor_from"] == f"runs/trial/{runs[point.floor][0].name}/results.json"
    assert f"threads {max(1, cores() // 2)}\n" in swept.log("start-s0")
    again = trial.run()
    assert again.said == ["8 of 8 points are done already."]
    assert {name: [run.name for run in found] for name, found in again.folder.attempts().items()} == {
        name: [run.name for run in found] for name, found in runs.items()
    }


def test_a_command_that_is_only_shown_names_runs_that_are_done(bench):
    trial = bench(start={}, grid={ETA: [0.1]})
    points = read_sweep(trial.file).points()
    before = sweep_options(points[-1], SweepFolder("runs/trial"), {})
    assert before["model.init_from"] == f"runs/trial/<run of {points[0].name}>/model"
    swept = trial.run()
    (run,) = swept.folder.attempts()[points[0].name]
    assert sweep_options(points[-1], swept.folder, {})["model.init_from"] == f"runs/trial/{run.name}/model"


def test_new_points_join_and_old_ones_stay(bench):
    trial = bench(grid={ETA: [0.1]})
    (first,) = trial.run().summary.done
    trial.content["grid"] = {ETA: [0.2, 0.1]}
    second = trial.run()
    assert second.said[0] == "1 of 2 points are done already."
    assert len(second.summary.done) == 2
    assert first in second.summary.done


def test_a_failed_point_stops_nobody_and_is_tried_again(bench, tmp_path):
    points = [{ETA: 0.1}, {ETA: 0.2, "data.fail": "true"}, {ETA: 0.3}]
    trial = bench(list=points)
    swept = trial.run()
    assert len(swept.summary.done) == 2
    ((name, code),) = swept.summary.failed.items()
    assert ("0.2" in name, code) == (True, 1)
    where = next(i for i, line in enumerate(swept.said) if "FAILED" in line)
    assert swept.said[where].endswith("FAILED with exit code 1; 1 left. Its log ends with")
    assert swept.said[where + 1 : where + 5][-2:] == ["    a line before", "    error: this point cannot be"]
    assert sorted(statuses(swept.folder).values()) == ["done", "done", "failed"]
    table, text = write_tables(swept.folder, list(swept.engine.points.values()))
    rows = {row["model.efficiency_weight"]: row for row in csv.DictReader(table.read_text().splitlines())}
    assert {key: row["status"] for key, row in rows.items()} == {"0.1": "done", "0.2": "failed", "0.3": "done"}
    assert (rows["0.1"]["hard"], rows["0.2"]["hard"]) == ("0.89", "")
    assert f"1 of 3 fits are not done: {name}" in text.read_text()
    (tmp_path / "mended").touch()
    again = trial.run()
    assert again.said[0] == "2 of 3 points are done already."
    assert (len(again.summary.done), again.summary.failed) == (3, {})
    assert len(again.folder.attempts()[name]) == 1  # the attempt without a checkpoint is gone


def test_without_its_start_a_point_is_not_run(bench):
    swept = bench(start={"overrides": {"data.fail": "true"}}, seeds=[0, 1], grid={ETA: [0.1]}).run()
    assert (len(swept.summary.failed), len(swept.summary.blocked), swept.summary.done) == (2, 2, [])
    assert sum(": not run, for start-s" in line for line in swept.said) == 2


def floors_of(swept):
    file = write_tables(swept.folder, list(swept.engine.points.values()))[0]
    return {row["role"]: (row["status"], row["floor"]) for row in csv.DictReader(file.read_text().splitlines())}


def test_points_do_not_wait_for_the_floor(bench):
    """It is reported beside them all the same."""
    trial = bench(floor={"overrides": {"data.step": 3.0}}, grid={ETA: [0.1, 0.2]})
    swept = trial.run(workers=2)
    roles = [swept.engine.points[name].role for name in swept.summary.done]
    assert roles == ["point", "point", "floor"]
    assert floors_of(swept) == {"floor": ("done", "0.5"), "point": ("done", "0.5")}
    (run,) = swept.folder.attempts()[swept.summary.done[0]]
    assert "--run.floor_from" not in json.loads((run / "config.yaml").read_text())


def test_without_its_floor_a_point_is_run(bench):
    swept = bench(floor={"overrides": {"data.fail": "true"}}, grid={ETA: [0.1]}).run()
    assert (len(swept.summary.done), len(swept.summary.failed), swept.summary.blocked) == (1, 1, [])
    assert floors_of(swept) == {"floor": ("failed", ""), "point": ("done", "")}


def test_means_and_deviations_over_the_seeds(bench):
    swept = bench(seeds=[0, 1, 2], start={}, floor={}, variants={"LTE": {"grid": {ETA: [0.5]}}}).run()
    lines = write_tables(swept.folder, list(swept.engine.points.values()))[1].read_text().splitlines()
    (line,) = (line for line in lines if "| LTE |" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    kept = [100 * (0.35 + s / 100) / (0.4 + s / 100) for s in range(3)]  # of 0.9 to 0.5
    assert cells[:4] == ["sst2", "accuracy", "LTE", "0.5"]
    assert cells[4:8] == ["0, 1, 2", "0.9100 ± 0.0100", "0.8600 ± 0.0100", "33.3 ± 0.0 %"]
    assert cells[9].startswith(f"{sum(kept) / 3:.0f} ±")


def test_a_sweep_killed_in_the_middle_goes_on_with_what_is_missing(bench, tmp_path):
    trial = bench(start={}, grid={ETA: [0.1, 0.2, 0.3, 0.4]}, overrides={"data.step": 1.0})
    process = trial.begin(workers=2)
    runs = tmp_path / "runs" / "trial"
    # the start is done, and each worker has a point with a checkpoint and no results
    until(lambda: len(list(runs.glob("*/results.json"))) >= 1)
    until(lambda: len(list(runs.glob("*/checkpoints/last.ckpt"))) > len(list(runs.glob("*/results.json"))))
    process.kill()
    process.wait()
    done = {file.parent.name for file in runs.glob("*/results.json")}
    begun = {file.parents[1].name for file in runs.glob("*/checkpoints/last.ckpt")} - done
    assert begun
    swept = trial.run(workers=2)
    assert (len(swept.summary.done), swept.summary.failed) == (5, {})
    kept = {run.name for found in swept.folder.attempts().values() for run in found}
    assert len(kept) == 5  # nothing was done twice
    assert done | begun <= kept
    for name, found in swept.folder.attempts().items():
        log = swept.folder.log(name).read_text()
        assert log.count("resumed") == (found[0].name in begun), name
        assert len(found) == 1
        assert log.count(f"--run.name {name}") <= 1 + (found[0].name not in done | begun)


def test_no_second_sweep_while_one_or_its_fits_run(bench, tmp_path):
    trial = bench(overrides={"data.step": 60})
    process = trial.begin()
    try:
        until(lambda: list(tmp_path.glob("runs/trial/*/run.json")), 60)
        with pytest.raises(UserError, match=rf"another sweep \(process {process.pid}\) runs in .*runs/trial"):
            trial.run()
    finally:
        process.terminate()
        process.wait()


def test_fits_that_outlive_their_sweep_keep_its_folder(bench, tmp_path):
    """As where the kernel does not end them: a grandchild holds the lock."""
    sweep = read_sweep(bench(grid={ETA: [1]}).file)
    folder = SweepFolder(tmp_path / "runs" / "trial")
    with folder.hold(sweep):
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(folder.lock,))
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        os.pwrite(folder.lock, str(gone.pid).encode().ljust(32), 0)
    with (
        pytest.raises(UserError, match=r"fits of a sweep that was killed .* still run"),
        SweepFolder(folder.path).hold(sweep, patience=0.3),
    ):
        pytest.fail("two at a time")
    orphan.communicate(b"\n")
    with SweepFolder(folder.path).hold(sweep):
        pass


def test_an_interrupt_ends_the_running_points(bench, tmp_path):
    trial = bench(overrides={"data.step": 60}, seeds=[0, 1])
    process = trial.begin(2)
    runs = tmp_path / "runs" / "trial"
    until(lambda: len(list(runs.glob("*/run.json"))) == 2)
    time.sleep(0.2)  # the points' times are kept in tenths of a second, which a quick machine has not spent yet
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert set(statuses(SweepFolder(runs)).values()) == {"stopped"}
    assert all(json.loads(file.read_text())["seconds"] > 0 for file in runs.glob("points/*.json"))
    with SweepFolder(runs).hold(read_sweep(trial.file), patience=0):
        pass  # nobody is left


def test_fits_of_a_background_job_hear_an_interrupt(tmp_path):
    """A shell lets its background jobs ignore interrupts, and what they start inherits that."""
    words = [sys.executable, "-c", "import signal; print('ready', flush=True); signal.pause()"]
    runner, log = LocalRunner(program=()), tmp_path / "log"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        runner.start("fit", words, log)
    finally:
        signal.signal(signal.SIGINT, before)
    (process,) = runner._running.values()
    until(lambda: log.read_text() == "ready\n")
    runner.stop()
    assert process.returncode == -signal.SIGINT  # not killed for want of an answer
    assert "KeyboardInterrupt" in log.read_text()


def test_a_checkpoint_that_leads_nowhere_is_dropped_at_the_second_failure(bench, tmp_path):
    trial = bench(overrides={"data.stop": "true"})
    first = trial.run()
    ((name, _),) = first.summary.failed.items()
    (run,) = first.folder.attempts()[name]
    (run / "config.yaml").write_text("{}")  # what cannot go on
    assert trial.run().summary.failed == {name: 1}
    (tmp_path / "mended").touch()
    last = trial.run()
    assert last.summary.done == [name]
    assert last.folder.attempts()[name] != [run]
    assert not run.exists()
    assert last.folder.log(name).read_text().count("$ lightning fit") == 3


def test_a_checkpoint_is_kept_when_its_fit_was_killed(bench, tmp_path):
    trial = bench(overrides={"data.stop": "true"})
    first = trial.run()
    ((name, _),) = first.summary.failed.items()
    (point,) = first.engine.points.values()
    for code in (-9, 137, -1):  # a signal, one behind a shell, a machine of a cluster that was lost
        first.folder.remember(point, resumed=True, code=code)
        assert "--ckpt_path" in first.engine.words(point), code
    (tmp_path / "mended").touch()
    last = trial.run()
    assert last.summary.done == [name]
    assert "resumed" in last.log("")


def test_a_fit_that_has_its_results_is_done_however_it_ended(bench):
    trial = bench(start={}, overrides={"data.late": "true"}, grid={ETA: [0.5]})
    swept = trial.run()
    assert (len(swept.summary.done), swept.summary.failed) == (2, {})
    assert [line.strip() for line in swept.said if "exit code" in line or "server" in line] == [
        "It has its results, and ended with exit code 1 nevertheless. Its log ends with",
        "error: the server has gone",
    ] * 2
    (start,) = [point for point in swept.engine.points.values() if point.role == "start"]
    shutil.rmtree(swept.folder.finished(start.name) / "model")
    assert trial.run().summary.failed == {}
    # old results without a model are not those of a start that was run once more, and failed
    again = SweepFolder(swept.folder.path)
    engine = Engine(again, LocalRunner(), say=swept.said.append)
    engine.points[start.name], engine._running[start.name] = start, 0.0
    for run in again.attempts()[start.name]:
        shutil.rmtree(run / "model", ignore_errors=True)
    engine._settle(start.name, 1)
    assert engine.summary.failed == {start.name: 1}


def test_a_damaged_checkpoint_is_no_checkpoint(bench, tmp_path):
    trial = bench(overrides={"data.stop": "true"})
    first = trial.run()
    ((name, _),) = first.summary.failed.items()
    (run,) = first.folder.attempts()[name]
    (run / "checkpoints" / "last.ckpt").write_bytes(b"half")
    (tmp_path / "mended").touch()
    swept = trial.run()
    assert swept.summary.done == [name]
    assert "resumed" not in swept.folder.log(name).read_text()


def test_a_folder_of_another_version(bench, tmp_path):
    trial = bench()
    trial.run()
    file = tmp_path / "runs" / "trial" / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layout": 9}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"sweep\.json has layout 9, this lte-lightning reads 1"):
        trial.run()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_something_else(bench, tmp_path):
    (tmp_path / "runs" / "trial").mkdir(parents=True)
    (tmp_path / "runs" / "trial" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds something else than a sweep; choose another --folder"):
        bench().run()
    assert [file.name for file in (tmp_path / "runs" / "trial").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"thesis\.txt is a file, not a sweep's folder; choose another --folder"):
        SweepFolder(tmp_path / "runs" / "trial" / "thesis.txt").check(read_sweep(bench().file))


def test_a_damaged_folder(bench, tmp_path):
    trial = bench()
    trial.run()
    for content in ("", "[]"):
        (tmp_path / "runs" / "trial" / "sweep.json").write_text(content)
        with pytest.raises(UserError, match=r"sweep\.json is damaged: .*; put it back, or choose another folder"):
            trial.run()


def test_a_folder_that_cannot_be_written(bench, tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match=r"cannot write the sweep's folder .*runs/trial.*choose another --folder"):
        bench().run()


def test_results_of_another_version(bench):
    trial = bench()
    swept = trial.run()
    (run,) = swept.folder.attempts()[swept.summary.done[0]]
    shutil.copy(run / "results.json", run / "kept")
    (run / "results.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(UserError, match=r"results\.json is damaged, or was written by another version"):
        write_tables(swept.folder, list(swept.engine.points.values()))


def test_results_are_enough_to_be_done(bench):
    """Model and checkpoints may be removed to save the disk's room."""
    trial = bench(start={}, floor={}, grid={ETA: [0.5]})
    swept = trial.run()
    for (run,) in swept.folder.attempts().values():
        shutil.rmtree(run / "model")
        shutil.rmtree(run / "checkpoints")
    before = {file: file.read_text() for file in swept.folder.path.glob("*/*") if file.is_file()}
    again = trial.run()
    assert again.said == ["3 of 3 points are done already."]
    assert {file: file.read_text() for file in before} == before
    # only what is missing needs the start's weights: that is run beside its results
    trial.content["grid"] = {ETA: [0.5, 0.7]}
    more = trial.run()
    assert (len(more.summary.done), more.summary.failed) == (4, {})
    assert more.said[0].endswith(": its model/ is not there any more, so it is run once more.")
    assert sorted(len(runs) for runs in more.folder.attempts().values()) == [1, 1, 1, 2]
    kept = [file for file in before if file.name == "results.json"]
    assert {file: file.read_text() for file in kept} == {file: before[file] for file in kept}
    (start,) = (runs for runs in more.folder.attempts().values() if len(runs) == 2)
    assert more.folder.finished(json.loads((start[0] / "run.json").read_text())["name"]) == start[1]
    assert trial.run().said == ["4 of 4 points are done already."]


def test_a_sweep_killed_while_it_wrote_its_first_file(bench, tmp_path):
    folder = tmp_path / "runs" / "trial"
    (folder / "points").mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "sweep.json.tmp").write_text('{"lay')
    assert len(bench().run().summary.done) == 1


def test_workers(bench):
    with pytest.raises(UserError, match="workers is 0; it must be at least 1"):
        LocalRunner(0)
