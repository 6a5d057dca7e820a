"""Fits on a Ray cluster: a real one, on this machine."""

import json
import socket
import sys
from pathlib import Path

import pytest

from lte_lightning.core.errors import UserError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")

from lte_lightning.sweep.ray import RayRunner  # noqa: E402

STAND_IN = Path(__file__).parent / "stand_in.py"
ETA = "model.efficiency_weight"


@pytest.fixture
def runner():
    """`runner(**arguments)` joins a cluster that was started for it."""
    yield lambda **more: RayRunner("local", **more)
    ray.shutdown()


@pytest.mark.timeout(300)
def test_a_sweep_on_a_cluster(bench, runner):
    points = [{ETA: 0.1}, {ETA: 0.2, "data.fail": "true"}, {ETA: 0.3}]
    trial = bench(start={}, list=points, seeds=[0])
    swept = trial.run(runner=runner(workers=2, program=(sys.executable, str(STAND_IN))))
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


def test_a_cluster_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"cannot reach a Ray cluster at 127\.0\.0\.1:{port}"):
        RayRunner(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="'nonsense' is no address of a Ray cluster; give host:port"):
        RayRunner("nonsense")
    with pytest.raises(UserError, match="a fit takes at least one core"):
        RayRunner("local", cpus=0)
