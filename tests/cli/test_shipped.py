"""The configurations and sweeps that come with the package, by name."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lte_lightning import shipped
from lte_lightning.errors import UserError

ROOT = Path(__file__).parents[2]


def test_every_file_has_a_name():
    for kind in (shipped.CONFIGS, shipped.SWEEPS):
        files = {shipped.resolve(f"lte:{name}", kind) for name in shipped.names(kind)}
        assert files == {str(path) for path in (ROOT / kind).rglob("*.yaml")}
        assert files


def test_words_without_the_scheme_and_other_options_stay():
    words = ["fit", "--config", "lte:quickstart", "--config=lte:glue/parts/floor.yaml", "--run.name", "lte:quickstart"]
    first, second = (str(ROOT / "conf" / name) for name in ("quickstart.yaml", "glue/parts/floor.yaml"))
    assert shipped.resolve_options(words) == ["fit", "--config", first, f"--config={second}", "--run.name", words[-1]]


@pytest.mark.parametrize(
    ("name", "meant"), [("quikstart", "quickstart"), ("minilm-sst2", "glue/minilm-sst2"), ("zzz", None)]
)
def test_an_unknown_name_gets_the_nearest(name, meant):
    with pytest.raises(UserError, match=f"there is no lte:{name} in .*conf") as refusal:
        shipped.resolve(f"lte:{name}")
    assert (f"; did you mean lte:{meant}?" in str(refusal.value)) is bool(meant)
    assert "lte configs" in str(refusal.value)


def test_the_command_line_takes_and_lists_them(lightning, parse, tmp_path):
    cli = parse("--config", "lte:glue/minilm-stsb", "--config", "lte:glue/parts/floor", "--trainer.accelerator", "cpu")
    assert (cli.datamodule.task, cli.model.lte.selector) == ("stsb", "none")
    listed = lightning(tmp_path, None, "configs")
    assert "  lte:own-classifier " in listed.out
    assert "  lte:parts/lora " in listed.out
    assert "  lte:smoke " in listed.out
    printed = lightning(tmp_path, None, "configs", "lte:quickstart")
    assert printed.out == (ROOT / "conf" / "quickstart.yaml").read_text()
    wrong = lightning(tmp_path, None, "fit", "--config", "lte:quikstart")
    assert wrong.code == 1
    assert "error: there is no lte:quikstart" in wrong.err


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Run a command of the wheel, made from the sdist and installed into a folder where there is nothing else."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    python = [sys.executable, "-m"]
    quiet = {"cwd": ROOT, "check": True, "capture_output": True, "text": True}
    subprocess.run([*python, "hatchling", "build", "-t", "sdist", "-d", str(wheels)], **quiet)
    (sdist,) = wheels.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none
        archive.extractall(wheels)
    (source,) = (path for path in wheels.iterdir() if path.is_dir())
    assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "tests"} <= {
        one.name for one in source.iterdir()
    }
    build = [*python, "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(build, **quiet | {"cwd": source})
    (wheel,) = wheels.glob("*.whl")
    install = ["pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([*python, *install, str(wheel)], **quiet)

    def run(*words):
        cwd = tmp_path_factory.mktemp("empty")
        environment = os.environ | {"PYTHONPATH": str(target)}
        done = subprocess.run(
            [*python, "lte_lightning", *words], cwd=cwd, env=environment, capture_output=True, text=True
        )
        return done, target

    return run


@pytest.mark.timeout(600)
def test_an_installed_wheel_runs_its_configurations_in_an_empty_folder(installed, tiny):
    listed, target = installed("configs")
    assert listed.returncode == 0, listed.stderr
    assert f"in {target}/lte_lightning/experiments/conf:" in listed.stdout
    assert [line.split()[0] for line in listed.stdout.splitlines() if line.startswith("  ")] == [
        f"lte:{name}" for kind in (shipped.CONFIGS, shipped.SWEEPS) for name in shipped.names(kind)
    ]
    once = ("--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    own = ("--data.source", str(tiny.task("sst2")), "--model.pretrained", str(tiny.model), "--data.max_length", "16")
    # This one names files beside it, in folders of their own.
    fit, _ = installed("fit", "--config", "lte:glue/minilm-sst2", *own, "--model.lte.expert_size", "8", *once)
    assert fit.returncode == 0, fit.stderr
    quick = ("--data.train_rows", "64", "--trainer.limit_val_batches", "2", "--trainer.precision", "32-true")
    short = [f"--stages.{stage}.epochs={epochs}" for stage, epochs in (("dense", 1), ("router", 1), ("expert", 1))]
    small = ("--model.layers", "2", "--trainer.accelerator", "cpu", "--trainer.logger", "false", *quick, *short)
    quickstart, _ = installed("fit", "--config", "lte:quickstart", *small)
    assert quickstart.returncode == 0, quickstart.stderr
    assert "film reviews (Rotten Tomatoes): accuracy on the validation rows" in quickstart.stdout
    assert quickstart.stdout.rstrip().endswith("results.json")
    (reviews,) = tiny.task("sst2").glob("train.*")
    begun, _ = installed("init", "new", "--data", str(reviews), "--model", str(tiny.model))
    assert begun.returncode == 0, begun.stderr
    sweep, _ = installed("sweep", "lte:smoke", "--dry-run")
    assert sweep.returncode == 0, sweep.stderr
    assert f"{target}/lte_lightning/experiments/conf/quickstart.yaml" in sweep.stdout


def test_the_folder_of_a_run_is_its_configuration(lightning, tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    refused = lightning(tmp_path, None, "fit", "--config", str(run))
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert f"--config is {run}, a folder without config.yaml; name a file" in refused.err
    (run / "config.yaml").write_text("seed_everything: 7\n")
    for words in (["--config", str(run)], ["-c", str(run)]):
        assert shipped.resolve_options(words) == [words[0], str(run / "config.yaml")]
    assert shipped.resolve_options([f"--config={run}"]) == [f"--config={run}/config.yaml"]
    with pytest.raises(UserError, match=rf"did you mean {run}/config.yaml\?"):
        shipped.resolve(str(run / "model"))
