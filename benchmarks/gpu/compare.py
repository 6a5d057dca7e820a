"""Trains several methods at one sparsity, from one dense start, at once on a GPU: a first look in a few minutes.

    python benchmarks/gpu/compare.py --model MODEL --data E2E --out runs --seeds 0,1

MODEL is a decoder's folder or hub id. E2E is a folder with train.jsonl and validation.jsonl, whose rows have
meaning_representation and human_reference. ``lightning fit`` writes the run folders, and `lte report` reads them. The
script does not need MLflow.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Options of ``lightning fit`` beside the shared ones; {router} and {expert} are the stages' steps.
VARIANTS: dict[str, dict[str, object]] = {
    "dense, trained on": {
        "model.lte.selector": "narrow", "model.lte.target_sparsity": 0.0, "stages.router.epochs": 0,
        "stages.expert.steps": "{both}",
    },
    "LTE": {},
    "LTE, distilled": {"model.distillation": 0.5},
    "Deja Vu": {"model.lte.selector": "dejavu", "model.lte.expert_size": 1, "stages.expert.steps": "{both}"},
    "Deja Vu, distilled": {
        "model.lte.selector": "dejavu", "model.lte.expert_size": 1, "stages.expert.steps": "{both}",
        "model.distillation": 0.5,
    },
    "narrower, single neurons, distilled": {
        "model.lte.selector": "narrow", "model.lte.expert_size": 1, "stages.router.epochs": 0,
        "stages.expert.steps": "{both}", "model.distillation": 0.5,
    },
}  # fmt: skip


def command(args: argparse.Namespace, name: str, seed: int, options: dict[str, object]) -> list[str]:
    """Returns the command line of one fit."""
    shared = {
        "data.source": args.data, "data.batch_size": args.batch_size, "model.pretrained": args.model,
        "model.layers": args.layers, "seed_everything": seed, "trainer.limit_val_batches": args.validate,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false", "run.root": args.out, "run.name": f"{name}, seed {seed}",
        "run.latency_rows": 1,
    }  # fmt: skip
    words = [sys.executable, "-m", "lte_lightning", "fit", "--config", str(ROOT / args.config)]
    for key, value in (shared | options).items():
        if value is not None:
            text = str(value).format(router=args.steps, expert=args.steps, both=2 * args.steps)
            words += [f"--{key}", text]
    return words


def start(args: argparse.Namespace, name: str, seed: int, options: dict[str, object]) -> subprocess.Popen[bytes]:
    """Starts one fit, and sends its output to a file beside the runs."""
    args.out.mkdir(parents=True, exist_ok=True)
    log = open(args.out / f"{name}-s{seed}.log", "wb")  # noqa: SIM115 - the process writes it
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(command(args, name, seed, options), stdout=log, stderr=subprocess.STDOUT, env=env)


def table(out: Path) -> str:
    """Returns the results of the fits, one line each."""
    lines = []
    for file in sorted(out.glob("*/*/results.json")):
        found, run = json.loads(file.read_text()), json.loads((file.parent / "run.json").read_text())
        shown = {key: found.get(key) for key in ("dense", "hard_before", "hard", "sparsity")}
        cells = [f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()]
        lines.append(f"{run.get('name') or file.parent.name}: {', '.join(cells)}")
    return "\n".join(sorted(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of the decoder")
    parser.add_argument("--data", required=True, help="folder of E2E's rows")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    parser.add_argument("--config", default="conf/generation/smollm2-e2e.yaml", help="default: %(default)s")
    parser.add_argument("--only", help="names by commas, with ';' for a comma of their own; by default all")
    parser.add_argument("--seeds", default="0", help="default: %(default)s")
    parser.add_argument("--sparsity", type=float, default=0.8, help="default: %(default)s")
    parser.add_argument("--dense-steps", type=int, default=300, help="of the dense start (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each of the two stages (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--validate", type=int, default=32, help="batches of validation rows (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="keep the first ones only; by default all")
    args = parser.parse_args()
    names = [name.replace(";", ",") for name in args.only.split(",")] if args.only else list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variant {unknown[0]!r}; there are: {'; '.join(VARIANTS)}")

    began = time.monotonic()
    stages = {"stages.router.epochs": 0, "stages.expert.epochs": 0}
    dense = start(args, "dense start", 0, {"stages.dense.steps": args.dense_steps, **stages})
    if dense.wait():
        sys.exit((args.out / "dense start-s0.log").read_text()[-3000:])
    (model,) = args.out.glob("*/*/model")
    print(f"dense start: {time.monotonic() - began:.0f} s", flush=True)
    adapted = {
        "model.init_from": model, "stages.dense.epochs": 0, "stages.router.steps": "{router}",
        "stages.expert.steps": "{expert}", "model.lte.target_sparsity": args.sparsity,
    }  # fmt: skip
    fits = {
        (name, seed): start(args, name, seed, adapted | VARIANTS[name])
        for name in names
        for seed in map(int, args.seeds.split(","))
    }
    failed = [key for key, fit in fits.items() if fit.wait()]
    print(f"all: {time.monotonic() - began:.0f} s\n{table(args.out)}")
    for name, seed in failed:
        print(f"failed: {name}, seed {seed}\n{(args.out / f'{name}-s{seed}.log').read_text()[-1500:]}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
