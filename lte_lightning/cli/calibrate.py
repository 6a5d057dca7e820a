"""``lte calibrate``: stores thresholds for several sparsities in a saved model."""

import math

from lte_lightning.errors import UserError
from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command.

    Raises:
        UserError: If an argument is wrong; the folder is not changed then.
    """
    call(calibrate, "lte calibrate", args, positional="folder")


def calibrate(
    folder: str,
    sparsity: str = "0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    layers: str = "free",
    data: str | None = None,
    tokens: int = 8192,
    device: str = "auto",
) -> None:
    """Finds the thresholds at which a saved model has each of these sparsities, and keeps them in its folder.

    lte calibrate RUN --sparsity 0.5,0.7,0.9

    The model loads as before. lte_lightning.set_sparsity(model, 0.6), lte generate --sparsity 0.6 and lightning test
    --model.sparsity 0.6 use the table; they interpolate between its entries, and refuse what lies outside of it.

    Args:
        folder: A saved LTE model, or a run's folder.
        sparsity: Shares of the FFN neurons that shall not run, with commas between. They replace an earlier table.
        layers: free uses one threshold for all layers, equal the same sparsity in every layer. least-loss gives more
            sparsity to layers where it raises the loss less; it needs labels, and 8 passes over the rows per layer.
        data: A configuration (.yaml) with model and data, whose training rows are taken, or a text file or folder for a
            language model. By default the run's own config.yaml.
        tokens: Tokens to calibrate on; fewer if the rows have no more.
        device: cpu, cuda or cuda:1; auto takes a CUDA device where there is one.

    Raises:
        UserError: If an option has an invalid value, or no thresholds can be found.
    """
    wanted = read_sparsities(sparsity)
    if tokens < 1:
        raise UserError(f"--tokens is {tokens}; it must be at least 1")
    from dataclasses import replace

    import torch
    from rich.console import Console
    from rich.table import Table

    from lte_lightning.bench.machine import find_device
    from lte_lightning.cli.rows import load_rows
    from lte_lightning.core.model.folder import read_description
    from lte_lightning.core.model.thresholds import THRESHOLDS_FILE, write_table
    from lte_lightning.core.routing.knob import LAYERS, find_thresholds, require_knob
    from lte_lightning.core.routing.observe import take_tokens

    if layers not in LAYERS:
        raise UserError(f"--layers is {layers!r}; there are {', '.join(LAYERS)}")
    rows = load_rows(folder, data, find_device(device))
    net = rows.module.net
    require_knob(net)
    with torch.no_grad(), rows.computing():
        calibrated = find_thresholds(net, list(take_tokens(rows.calibration(), tokens)), wanted, layers, progress=True)
    write_table(replace(calibrated, rows=rows.source), rows.folder, read_description(rows.folder))
    table = Table(title=f"{calibrated.tokens} tokens, layers {layers}")
    for name in ("sparsity", "reached", "least layer", "most layer"):
        table.add_column(name, justify="right")
    for setting in calibrated.settings:
        shares = (setting.reached, min(setting.per_layer), max(setting.per_layer))
        table.add_row(f"{setting.sparsity:g}", *(f"{100 * share:.1f} %" for share in shares))
    Console().print(table)
    print(f"wrote {rows.folder / THRESHOLDS_FILE}")
    missed = [setting for setting in calibrated.settings if abs(setting.reached - setting.sparsity) > 0.01]
    for setting in missed:
        print(f"{setting.sparsity:g} was missed by more than a point: the scores lie too close together there")


def read_sparsities(text: str) -> list[float]:
    """Returns the sparsities of an option, ascending.

    Raises:
        UserError: If one is no number above 0 and below 1.
    """
    try:
        values = sorted({float(word) for word in text.split(",")})
    except ValueError:
        values = [math.nan]
    if not all(0.0 < value < 1.0 for value in values):
        raise UserError(f"--sparsity is {text}; give shares above 0 and below 1, with commas between: 0.5,0.7,0.9")
    return values
