"""A sweep's folder as fits would have left it, with figures that a test can compute by hand."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text

from lte_lightning.sweep.folder import LAYOUT

DENSE, FLOOR = 0.90, 0.60
# Method: its figure at a sparsity
METHODS = {
    "LTE": lambda s: DENSE - 0.04 * s**4,
    "TEAL": lambda s: DENSE - 0.3 * s**3,
    "<b>KLA & Co.</b>": lambda s: DENSE - 0.1 * s**2,
}
SELECTORS = {"LTE": "router", "TEAL": "teal", "<b>KLA & Co.</b>": "kla"}
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
# As in sweeps/compare-stsb.yaml: the selector, and how much is lost
ALL_METHODS = {
    "dense, trained on": ("narrow", 0.0),
    "narrower dense": ("narrow", 0.05),
    "KLA (oracle)": ("kla", 0.06),
    "MoEfication, ground truth (oracle)": ("kla", 0.08),
    "MoEfication": ("moefication", 0.1),
    "Deja Vu": ("dejavu", 0.11),
    "CATS": ("cats", 0.12),
    "D2DMoE": ("d2dmoe", 0.13),
    "noisy top-k softmax": ("softmax", 0.15),
    "LTE": ("router", 0.03),
    "sigma-MoE": ("sigmamoe", 0.17),
    "random routers": ("random", 0.2),
    "TEAL": ("teal", 0.22),
    "Wanda": ("wanda", 0.6),
    "Wanda, 2:4 and 4:8": ("wanda", 0.1),
}
GFLOP = 2**30


def results(task: str, metric: str, hard: float | None, sparsity: float | None, seed: int, **more: Any) -> dict:
    attention, ffn = 4.0 * GFLOP, 8.0 * GFLOP
    return {
        "task": task,
        "data": "x",
        "metric": metric,
        "dense": DENSE + seed / 100,
        "soft": None,
        "hard_before": None,
        "hard": hard,
        "sparsity": sparsity,
        "sparsity_per_layer": None if sparsity is None else [sparsity - 0.1, sparsity, sparsity + 0.1],
        "flops_per_token": int(attention + ffn * (1 - (sparsity or 0))),
        "dense_flops_per_token": int(attention + ffn),
        "bound": 1 / (1 - 2 / 3 * (sparsity or 0)),
        "seconds_per_stage": {"router": 12.0},
        "seed": seed,
        "versions": {"python": "3.11", "torch": "2.13", "threads": 1},
    } | more


def write_run(
    folder: Path,
    name: str | None,
    found: dict[str, Any],
    selector: str = "router",
    lte: dict | None = None,
    adapted: int = 2,
    **model: Any,
) -> Path:
    """Writes a run's folder, of a fit with so many epochs after the dense ones; `model` are options of its model."""
    bins = [10 if i < 25 else 5 if i > 40 else 0 if 29 < i < 32 else 1 for i in range(50)]
    if selector not in ("router", "softmax", "sigmamoe"):
        bins = [80, *[0] * 48, 20]  # a choice, no scores
    histogram = [bins] * 3
    (folder / "model").mkdir(parents=True)
    about = {"layout": 1, "name": name, "run_id": None, "tracking_uri": None, "experiment": "x"}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "results.json").write_text(json.dumps(found))
    about = {"measured": {"hard": {"score_histogram": histogram}}}
    lte = {"selector": selector, "threshold": 0.5} | (lte or {})
    saved = {"layout_version": 1, "model_type": "bert", "lte": lte, "about": about}
    (folder / "model" / "lte_config.json").write_text(json.dumps(saved))
    options = {"efficiency_weight": round(1 - (found["sparsity"] or 0), 2), "seed": 4} | model
    config = {"seed_everything": found["seed"], "run": {"name": name}, "model": {"init_args": options}}
    router = 1 if selector in ("router", "softmax", "sigmamoe") else 0
    config["stages"] = {
        "router": {"epochs": router, "steps": None},
        "expert": {"epochs": adapted - router, "steps": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="session")
def figures() -> Callable[..., dict[str, Any]]:
    """`figures(hard, sparsity, seed, **more)`: a `results.json` of sst2 whose expert stage ran, unless `more` says."""

    def make(hard: float | None, sparsity: float | None, seed: int = 0, **more: Any) -> dict[str, Any]:
        return results("sst2", "accuracy", hard, sparsity, seed, **{"seconds_per_stage": {"expert": 1.0}} | more)

    return make


@pytest.fixture(scope="session")
def make_points() -> Callable[..., Path]:
    """`make_points(folder, points, planned)` writes a sweep of such points; planned are names, or points.

    A point is a mapping of its `name` and `seed`, of what else a sweep remembers of it (`variant`, `parameters`,
    `role`, `status`), of its `results` (none: no run), and of what else `write_run` takes. `run` names its folder.
    """

    def make(
        folder: Path, points: list[dict[str, Any]], planned: list[str | dict[str, Any]] | None = None, **about: Any
    ) -> Path:
        (folder / "points").mkdir(parents=True)
        for point in points:
            name, given = point["name"], dict(point)
            keys = ("name", "seed", "role", "variant", "parameters", "status")
            facts = {"role": "point", "variant": None, "parameters": {}, "status": "done"}
            facts |= {key: given.pop(key) for key in keys if key in given}
            (folder / "points" / f"{name}.json").write_text(json.dumps(facts))
            if found := given.pop("results", None):
                write_run(folder / given.pop("run", name), name, found, **given)
        names = [point["name"] for point in points] if planned is None else planned
        plan = [{"role": "point", "variant": None, "parameters": {}} | name for name in names if isinstance(name, dict)]
        names = [name if isinstance(name, str) else name["name"] for name in names]
        about = {"layout": LAYOUT, "name": folder.name, "text": "", "planned": names, "plan": plan} | about
        (folder / "sweep.json").write_text(json.dumps(about))
        return folder

    return make


@pytest.fixture(scope="session")
def make_sweep() -> Callable[..., Path]:
    """`make_sweep(folder)` writes a sweep: three methods, four sparsities, three seeds, and a point that failed."""

    def make(folder: Path, task: str = "sst2", metric: str = "accuracy") -> Path:
        (folder / "points").mkdir(parents=True)

        def point(name: str, status: str = "done", **more: Any) -> None:
            facts = {"name": name, "role": "point", "variant": None, "parameters": {}, "status": status}
            facts["command"] = f"lightning fit --config a.yaml --run.name {name} '<i>&'"
            (folder / "points" / f"{name}.json").write_text(json.dumps(facts | more))

        for seed in range(3):
            write_run(folder / f"start{seed}", f"start{seed}", results(task, metric, None, None, seed))
            point(f"start{seed}", role="start", seed=seed)
            floor = FLOOR + seed / 100
            found = results(task, metric, floor, 1.0, seed, floor=floor)
            write_run(folder / f"floor{seed}", f"floor{seed}", found, "none")
            point(f"floor{seed}", role="floor", seed=seed)
            for method, curve in METHODS.items():
                for i, sparsity in enumerate(SPARSITIES):
                    name = f"{list(METHODS).index(method)}-{i}-{seed}"
                    found = results(task, metric, curve(sparsity) + seed / 100, sparsity, seed, floor=floor)
                    write_run(folder / name, name, found, SELECTORS[method])
                    point(name, variant=method, parameters={"model.eta": i}, seed=seed)
        point("LTE-broken", "failed", variant="LTE", seed=0)
        (folder / "points" / "LTE-broken.log").write_text("$ lightning fit\na line before\nerror: no\n\n")
        about = {"layout": LAYOUT, "name": "trial", "text": "All <methods> at once.", "planned": ["LTE-never"]}
        (folder / "sweep.json").write_text(json.dumps(about))
        return folder

    return make


@pytest.fixture(scope="session")
def swept(make_sweep, tmp_path_factory) -> Path:
    """Such a sweep; nobody changes it."""
    return make_sweep(tmp_path_factory.mktemp("swept") / "trial")


@pytest.fixture(scope="session")
def make_comparison() -> Callable[..., Path]:
    """`make_comparison(folder, seeds)` writes a sweep of fifteen methods; its run folders are named at random."""

    def make(folder: Path, seeds: int = 3) -> Path:
        (folder / "points").mkdir(parents=True)
        names = random.Random(0)
        planned = []

        def point(found: dict[str, Any], selector: str, **facts: Any) -> None:
            name = f"{facts['variant'] or facts['role']}-{found['sparsity']}-{found['seed']}"
            planned.append(name)
            write_run(folder / f"{names.getrandbits(64):x}", name, found, selector, efficiency_weight=0.5)
            facts |= {
                "name": name,
                "seed": found["seed"],
                "status": "done",
                "command": f"lightning fit --run.name '{name}'",
            }
            (folder / "points" / f"{name}.json").write_text(json.dumps(facts))

        for seed in range(seeds):
            point(results("stsb", "pearson", None, None, seed), "router", role="start", variant=None)
        for method, (selector, loss) in ALL_METHODS.items():
            for s in (0.0,) if method == "dense, trained on" else (0.5,) if "2:4" in method else SPARSITIES:
                for seed in range(seeds):
                    figure = DENSE + seed / 100 - loss * s**2 - loss * seed / 50
                    union = {"union_sparsity": {str(size): s / (1 + size * loss) for size in (1, 8, 64)}}
                    found = results("stsb", "pearson", figure, s, seed, floor=FLOOR + seed / 100, **union)
                    parameters = {"model.lte.target_sparsity": s}
                    point(found, selector, role="point", variant=method, parameters=parameters)
        about = {"layout": LAYOUT, "name": "compare", "text": "Every method.", "planned": planned}
        (folder / "sweep.json").write_text(json.dumps(about))
        return folder

    return make


@pytest.fixture(scope="session")
def compared(make_comparison, tmp_path_factory) -> Path:
    """Such a sweep with three seeds; nobody changes it."""
    return make_comparison(tmp_path_factory.mktemp("compared") / "all")


@pytest.fixture(scope="session")
def watch():
    """`with watch() as figures:` collects the figures that are saved, as they were drawn."""

    @contextmanager
    def run() -> Iterator[list[Figure]]:
        figures, save = [], Figure.savefig

        def savefig(figure: Figure, *args: Any, **options: Any) -> None:
            save(figure, *args, **options)
            figures.append(figure)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", savefig)
            yield figures

    return run


@pytest.fixture(scope="session")
def letters() -> Callable[[Figure, float], float]:
    """`letters(figure, pixels)`: the size of a figure's smallest letters when it is shown so many pixels wide."""

    def smallest(figure: Figure, pixels: float) -> float:
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
        assert not any("$" in text.get_text() for text in texts)  # exponents are smaller than they say
        return min(text.get_fontsize() for text in texts) / 72 * pixels / figure.get_figwidth()

    return smallest


BENCH = (
    "shape,scope,phase,dtype,tokens,sparsity,backend,threads,dense_ms,ms,ratio,router_ms,bound,share_of_bound,load\n"
)


@pytest.fixture(scope="session")
def bench_csv(tmp_path_factory) -> Path:
    """A file such as `lte bench --csv` writes."""
    rows = [
        f"llama2-7b,{scope},decode,bf16,1,{s},{backend},2,10.0,{10 / r:.3f},{r},0.1,{1 / (1.01 - s):.2f},0.9,0.5\n"
        for scope in ("ffn", "model")
        for backend, gain in (("cpu", 0.9), ("reference", 0.4))
        for s, r in ((s, round(gain / (1.05 - s), 3)) for s in (0.0, 0.5, 0.8, 0.9))
    ]
    file = tmp_path_factory.mktemp("bench") / "out.csv"
    file.write_text(BENCH + "".join(rows))
    return file
