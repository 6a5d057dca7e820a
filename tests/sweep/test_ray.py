"""Fits on a Ray cluster: a real one, on this machine."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lte_lightning.errors import UserError
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.spec import read_sweep

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")

from ray.cluster_utils import Cluster  # noqa: E402

from lte_lightning.sweep.ray import RayRunner  # noqa: E402

STAND_IN = Path(__file__).parent / "stand_in.py"
ETA = "model.efficiency_weight"
# A fit that takes so many seconds to end once it was told to
PATIENT = """
import os, signal, sys, time
def end(*_):
    time.sleep(float(sys.argv[1]))
    print("ended", flush=True)
    os._exit(1)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
print("began", *(f"{key}={os.environ.get(key)}" for key in ("SECRET_OF_THE_SWEEP", "HF_SOMETHING")), flush=True)
time.sleep(100)
"""


def until(condition):
    """Waits until something is so."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it never came to that")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two machines of two cores."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def runner():
    """`runner(address, **arguments)` joins a cluster; "local" is one that is started for it."""
    yield RayRunner
    ray.shutdown()


@pytest.mark.timeout(300)
def test_a_sweep_on_a_cluster(bench, runner):
    points = [{ETA: 0.1}, {ETA: 0.2, "data.fail": "true"}, {ETA: 0.3}]
    trial = bench(start={}, list=points, seeds=[0])
    swept = trial.run(runner=runner("local", workers=2, program=(sys.executable, str(STAND_IN))))
    assert len(swept.summary.done) == 3
    ((name, code),) = swept.summary.failed.items()
    assert (code, "0.2" in name) == (1, True)
    assert "error: this point cannot be" in swept.folder.last_lines(name)[-1]
    for name in swept.summary.done:
        assert "threads 1\n" in swept.folder.log(name).read_text()
    (run,) = swept.folder.attempts()[swept.summary.done[-1]]
    assert json.loads((run / "results.json").read_text())["hard"] == pytest.approx(0.87)
    ray.shutdown()
    with pytest.raises(UserError, match=r"a fit takes 1 and 64: lower --cpus or --gpus"):
        RayRunner("local", gpus=64)


@pytest.mark.timeout(300)
def test_a_fit_has_room_on_one_machine_or_on_none(cluster, runner):
    """Two machines of two cores have no room for three, which Ray would wait for without a word."""
    with pytest.raises(UserError, match=r"no machine .* there are some of 2 cores and 0 GPUs, and a fit takes 3"):
        runner(cluster, cpus=3)
    assert runner(cluster, cpus=2).slots == 2


@pytest.mark.timeout(300)
def test_what_is_stopped_has_ended_and_has_its_machine_s_environment(cluster, runner, tmp_path, monkeypatch):
    """A fit ends in its own time, however often it is interrupted, and has what fits of a sweep have in common."""
    ray = runner(cluster, workers=1, program=(sys.executable, "-c", PATIENT))
    monkeypatch.setenv("SECRET_OF_THE_SWEEP", "1")
    monkeypatch.setenv("HF_SOMETHING", "2")
    log = tmp_path / "fit.log"
    ray.start("fit", ["2"], log)
    until(lambda: "HF_" in log.read_text() if log.exists() else False)
    (task,) = ray._running
    ray._ray.cancel(task, force=False)
    time.sleep(0.5)
    ray.stop()
    assert log.read_text().split() == ["began", "SECRET_OF_THE_SWEEP=None", "HF_SOMETHING=2", "ended"]


def test_a_fit_that_outlives_its_sweep_elsewhere_is_waited_for(bench, tmp_path):
    """As with a sweep that is killed and started again before Ray has noticed."""
    trial = bench()
    sweep, folder = read_sweep(trial.file), SweepFolder(tmp_path / "runs" / "trial")
    with folder.hold(sweep):
        log = folder.log("fit-s0")
    code = "import sys; from lte_lightning.sweep.ray import _run; _run(sys.argv[2:], '.', {}, sys.argv[1])"
    words = [sys.executable, "-c", code, str(log), sys.executable, "-c", PATIENT, "3"]
    worker = subprocess.Popen(words)
    until(lambda: "began" in log.read_text() if log.exists() else False)
    worker.kill()
    worker.wait()
    with (
        pytest.raises(UserError, match=r"the fit fit-s0 of .*trial still runs, perhaps on another machine; end it"),
        folder.hold(sweep, patience=0.2),
    ):
        pytest.fail("two at a time")
    with folder.hold(sweep):
        assert log.read_text().split()[-1] == "ended"


@pytest.mark.timeout(300)
def test_a_cluster_by_its_address(cluster):
    code = "import sys; from lte_lightning.sweep.ray import RayRunner; print(RayRunner(sys.argv[1], workers=1).slots)"
    words = [sys.executable, "-c", code, cluster]
    assert subprocess.run(words, capture_output=True, text=True, timeout=200).stdout.split()[-1] == "1"


def test_a_port_that_is_no_cluster_s(monkeypatch):
    monkeypatch.setattr("lte_lightning.sweep.ray.ANSWER", 3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"what listens at {address} does not answer as the head of a Ray cluster"):
            RayRunner(address)


def test_a_cluster_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"cannot reach a Ray cluster at 127\.0\.0\.1:{port}"):
        RayRunner(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="'nonsense' is no address of a Ray cluster; give host:port"):
        RayRunner("nonsense")
    with pytest.raises(UserError, match="a fit takes at least one core"):
        RayRunner("local", cpus=0)
