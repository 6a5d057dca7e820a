"""The checks of this project: `nox` runs lint and tests, `nox --list` names the rest. pytest gets arguments after `--`.

The sessions use plain venv and pip. All share the environment of the session `env`. That session creates it once
(minutes, some GB) and refreshes it when pyproject.toml or constraints.txt change.
"""

import hashlib
import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
SHARED = Path(os.environ.get("LTE_SHARED", ROOT.parent / "shared"))
# No session uses the hub: the tests build their models, and the regression session reads local folders.
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Two threads slow tiny models down, and small real ones too on a busy machine. One thread gives equal sums everywhere.
ONE_THREAD = OFFLINE | {"OMP_NUM_THREADS": "1"}
# A file's tests run in one process, so that its fixtures are made once and no two Ray clusters run side by side. Files
# keep their order. Sorted by number of tests, the few long tests of tests/cli would come last and leave a core idle.
# More than four processes need more memory than most machines have. With one process more than cores, tests with a
# clock of their own failed. A process that crashes ends the run; otherwise xdist would wait for its tests for ever.
ON_EVERY_CORE = (
    *("-n", "logical", "--maxprocesses", "4", "--max-worker-restart", "0"),
    *("--dist", "loadfile", "--no-loadscope-reorder"),
)


@nox.session(default=False)
def env(session: nox.Session) -> None:
    """Create or refresh the environment that the other sessions run in."""
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    ).hexdigest()
    stamp = Path(session.virtualenv.location, "installed.sha256")
    if not stamp.exists() or stamp.read_text() != wanted:
        # Python compiles the files that it imports. pip would compile all 26,000 files, which takes most of a minute.
        session.install(
            "--no-compile", "-c", "constraints.txt", "-e", ".[quickstart,dev,sweep,peft,harness,bench,docs]"
        )
        stamp.write_text(wanted)
    # The sessions that require this one inherit the environment of this process.
    os.environ["PATH"] = os.pathsep.join([session.bin, os.environ["PATH"]])


@nox.session(python=False, requires=["env"])
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session(python=False, requires=["env"])
def tests(session: nox.Session) -> None:
    """Run the tests on tiny models, one file at a time on each core (minutes)."""
    session.run("pytest", *ON_EVERY_CORE, *session.posargs, env=ONE_THREAD)


@nox.session(python=False, requires=["env"])
def regression(session: nox.Session) -> None:
    """Compare real small models with the committed goldens."""
    if not SHARED.is_dir():
        session.warn("no data beside the repository (../shared): tests on real data skip, set LTE_SHARED to run them")
    session.run("pytest", "-m", "regression", "--timeout=1200", "tests/regression", *session.posargs, env=real_models())


@nox.session(python=False, requires=["env"])
def goldens(session: nox.Session) -> None:
    """Rewrite tests/goldens. Read the diff before you commit it."""
    # `-k` may select no test in one of the two runs: pytest then exits with code 5.
    rewrite = ["--rewrite-goldens", "--timeout=1200", *session.posargs]
    session.run("pytest", *rewrite, env=ONE_THREAD, success_codes=[0, 5])
    session.run("pytest", "-m", "regression", *rewrite, env=real_models(), success_codes=[0, 5])


@nox.session(python=False, requires=["env"])
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device, then measure the triton backend; writes CSV files to gpu/."""
    session.run("pytest", "-m", "gpu", *session.posargs, env=OFFLINE)
    session.run("python", "benchmarks/gpu/measure.py", "--out", "gpu")


@nox.session(python=False, requires=["env"], default=False)
def browser(session: nox.Session) -> None:
    """Open a report in headless Chromium; the session fails without a browser."""
    session.run("pytest", "-m", "browser", *session.posargs, env=OFFLINE | {"LTE_BROWSER": "required"})


@nox.session(python=False, requires=["env"], default=False)
def kill(session: nox.Session) -> None:
    """Kill fits and sweeps at many moments and resume them (a quarter of an hour); writes a table to kill.md."""
    session.run(
        *("pytest", "-v", "-m", "kill", "tests/cli/test_killed.py", *session.posargs),
        env=ONE_THREAD | {"LTE_KILL_TABLE": "kill.md"},
    )


@nox.session(python=False, requires=["env"], default=False)
def arm(session: nox.Session) -> None:
    """Compile the CPU kernels for ARM and run them in qemu (minutes); needs g++-aarch64-linux-gnu and qemu-user."""
    session.run("pytest", "-v", "-m", "arm", "tests/kernels/cpu/test_arm.py", *session.posargs, env=ONE_THREAD)


@nox.session(python=False, requires=["env"], default=False)
def fuzz(session: nox.Session) -> None:
    """Read newly drawn damaged and hostile files, LTE_FUZZ (500) of each kind; writes a table to fuzz.md."""
    many = os.environ.get("LTE_FUZZ", "500")
    session.run(
        *("pytest", "-v", "tests/fuzz", *session.posargs),
        env=ONE_THREAD | {"LTE_FUZZ": many, "LTE_FUZZ_TABLE": "fuzz.md"},
    )


@nox.session(python=False, requires=["env"], default=False)
def mutants(session: nox.Session) -> None:
    """Change one operator or number at a time and check that a test notices (minutes a file); -- FILE --count N."""
    session.run("python", "tests/mutants.py", *session.posargs, env=ONE_THREAD)


@nox.session(name="hf-tests", python=False, requires=["env"], default=False)
def hf_tests(session: nox.Session) -> None:
    """Run Hugging Face's own common model tests on converted models; -- FOLDER names the tests of transformers."""
    session.run("python", "-m", "pip", "install", "--quiet", "parameterized", env=OFFLINE)  # their tests import it
    session.run("python", "tests/hugging_face.py", *session.posargs, env=ONE_THREAD)


@nox.session(python=False, requires=["env"], default=False)
def coverage(session: nox.Session) -> None:
    """Run the tests and list the lines and branches of the package they miss, with the total; -- FILE for a part."""
    session.run("coverage", "erase")
    # started processes are counted, too; everything takes longer, so tests have more time
    session.run("coverage", "run", "-m", "pytest", *ON_EVERY_CORE, "--timeout=600", *session.posargs, env=ONE_THREAD)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report", "--show-missing", "--skip-covered")


@nox.session(python=False, requires=["env"], default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation site in site/ and check its links; warnings are errors."""
    session.run("mkdocs", "build", "--strict", *session.posargs, env=OFFLINE | {"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=False, requires=["env"], default=False)
def notebooks(session: nox.Session) -> None:
    """Write the tutorials of docs/tutorials to notebooks/ as notebooks."""
    session.run("python", "docs/notebooks.py", "notebooks")


def real_models() -> dict[str, str]:
    """Return the environment of the sessions on real models. LTE_SHARED is their data; without it those tests skip."""
    return ONE_THREAD | ({"LTE_SHARED": str(SHARED)} if SHARED.is_dir() else {})
