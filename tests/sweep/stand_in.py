"""Does to a run folder what `lightning fit` does, in milliseconds: the engine's tests start it in place of a fit.

`--data.step 0.2` is how long it takes, in two halves: after the first it has a checkpoint. `--data.fail true` fails,
`--data.late true` when the results are there.
"""

import json
import os
import sys
import time
import uuid
import zipfile
from pathlib import Path


def begin_epoch(run: Path, stage: str, done: int) -> None:
    place = {"stage": stage, "epoch": 1, "epochs": 1, "done": done, "total": 2}
    (run / "progress.tmp").write_text(json.dumps(place))
    (run / "progress.tmp").replace(run / "progress.json")


def main() -> None:
    words = sys.argv[2:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    if "--ckpt_path" in given:
        run = Path(given["--ckpt_path"]).parents[1]
        given = json.loads((run / "config.yaml").read_text())
        print("resumed")
    else:
        run = Path(given["--run.root"], given["--run.experiment"], uuid.uuid4().hex)
        run.mkdir(parents=True)
        about = {"layout": 1, "name": given["--run.name"], "run_id": None, "tracking_uri": None}
        (run / "run.json").write_text(json.dumps(about))
        (run / "config.yaml").write_text(json.dumps(given))
    print(f"threads {os.environ['OMP_NUM_THREADS']}")
    for option in ("--model.init_from", "--run.floor_from"):
        if option in given and not Path(given[option]).exists():
            sys.exit(f"error: {option} {given[option]} is not there")
    if given.get("--data.fail") == "true" and not Path("mended").exists():
        print("a line before")
        sys.exit("error: this point cannot be")
    seconds = float(given.get("--data.step", 0))
    begin_epoch(run, "router", 0)
    time.sleep(seconds / 2)
    begin_epoch(run, "expert", 1)
    if not (run / "checkpoints").exists():
        (run / "checkpoints").mkdir()
        with zipfile.ZipFile(run / "checkpoints" / "last.ckpt", "w") as file:
            file.writestr("epoch", "1")
        if given.get("--data.stop") == "true" and not Path("mended").exists():
            sys.exit("error: in the second half")
    time.sleep(seconds / 2)
    (run / "model").mkdir(exist_ok=True)
    eta, seed = float(given.get("--model.efficiency_weight", 0.5)), int(given["--seed_everything"])
    floor = 0.5 if given.get("--model.lte.selector") == "none" else None
    if "--run.floor_from" in given:
        floor = json.loads(Path(given["--run.floor_from"]).read_text())["floor"]
    results = {
        "task": "sst2",
        "metric": "accuracy",
        "dense": 0.9 + seed / 100,
        "soft": None,
        "hard_before": None,
        "hard": None if given.get("--stages.expert.epochs") == "0" else 0.9 - eta / 10 + seed / 100,
        "sparsity": eta / (1 + eta),
        "sparsity_per_layer": [eta / (1 + eta)] * 2,
        "flops_per_token": int(2**30 / (1 + eta)),
        "dense_flops_per_token": 2**30,
        "bound": 1 + eta,
        "seed": seed,
        "seconds_per_stage": {"router": seconds},
        "versions": {"lte-lightning": "0", "threads": 1},
    } | ({} if floor is None else {"floor": floor})
    (run / "results.json").write_text(json.dumps(results))
    print(run / "results.json")
    if given.get("--data.late") == "true":
        sys.exit("error: the server has gone")


if __name__ == "__main__":
    main()
